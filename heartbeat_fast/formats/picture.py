"""Images and animations: PNG, JPEG, GIF, WebP (Pillow)."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from heartbeat_fast.files import check_pixels
from heartbeat_fast.formats.limits import check_picture
from heartbeat_fast.record import Record, view_in


def read(path: Path) -> Record:
    """All frames in grey; transparent pixels become black."""
    with Image.open(path) as image:
        check_pixels(path, getattr(image, "n_frames", 1), image.height, image.width)
        check_picture(path, image.height, image.width)
        frames, milliseconds = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(_grey(frame))
            milliseconds.append(float(frame.info.get("duration", 0)))
    duration = float(np.mean(milliseconds))
    return Record(
        frames=np.stack(frames),
        fps=1000 / duration if duration > 0 else 30.0,
        view=view_in(path.stem),
        source=path.name,
    )


def _grey(frame: Image.Image) -> NDArray[np.uint8]:
    if frame.mode.startswith("I"):  # 16 bit; Pillow's own conversion would clip at 255
        return (np.asarray(frame).astype(np.uint32) >> 8).astype(np.uint8)
    if "A" in frame.getbands() or "transparency" in frame.info:
        rgba = frame.convert("RGBA")
        frame = Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)
    return np.asarray(frame.convert("L"))
