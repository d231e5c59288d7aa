"""Video files through FFmpeg (PyAV)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import LARGEST, check_pixels
from heartbeat_fast.formats.limits import check_picture
from heartbeat_fast.record import Record, view_in


def read(path: Path) -> Record:
    """All frames of the first video stream, in grey."""
    av = optional("av", "formats")
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise FileError(f"{path}: no video stream in it")
        stream = container.streams.video[0]
        check_pixels(path, stream.height, stream.width)
        check_picture(path, stream.height, stream.width)
        most = LARGEST // (stream.height * stream.width)
        frames: list[NDArray[np.uint8]] = []
        for frame in container.decode(stream):
            if len(frames) == most:
                raise FileError(f"{path}: more than {most} frames; wanted a clip")
            frames.append(frame.to_ndarray(format="gray"))
        fps = float(stream.average_rate or 30)
    if not frames:
        raise FileError(f"{path}: no frame could be decoded")
    return Record(frames=np.stack(frames), fps=fps, view=view_in(path.stem), source=path.name)
