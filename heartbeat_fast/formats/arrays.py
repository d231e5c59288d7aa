"""NumPy archives, as `Clip.save("x.npz")` writes them: frames, spacing_mm, fps, conditions."""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from heartbeat_fast.conditions import NUM_LABELS
from heartbeat_fast.errors import FileError
from heartbeat_fast.files import check_pixels
from heartbeat_fast.formats.limits import check_density
from heartbeat_fast.record import Record, view_in


def read(path: Path) -> Record:
    """`frames` uint8 (F,H,W), and where given spacing_mm, fps, ef, mask, skeleton, flow, text."""
    _check_sizes(path)
    with np.load(path, allow_pickle=False) as archive:
        arrays: dict[str, Any] = dict(archive)
    if "frames" not in arrays:
        raise FileError(f"{path}: holds {', '.join(arrays) or 'nothing'}; wanted `frames`")
    labels = arrays.get("mask")
    if labels is not None:
        labels = labels.argmax(1) if labels.ndim == 4 else labels
        if labels.min() < 0 or labels.max() >= NUM_LABELS:
            raise FileError(f"{path}: mask {labels.min()} to {labels.max()}; wanted labels 0 to 3")
        labels = labels.astype(np.uint8)
    return Record(
        frames=arrays["frames"],
        labels=labels,
        spacing_mm=tuple(float(mm) for mm in arrays.get("spacing_mm", (1.0, 1.0))),  # type: ignore[arg-type]
        fps=float(arrays.get("fps", 30.0)),
        view=view_in(str(arrays.get("text", path.stem))),
        ef=float(arrays["ef"]) if "ef" in arrays else None,
        source=path.name,
        skeleton=arrays.get("skeleton"),
        flow=arrays.get("flow"),
    )


def _check_sizes(path: Path) -> None:
    """NumPy allocates what an array's header announces: hold it to what the archive holds."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        check_pixels(path, sum(entry.file_size for entry in entries))
        for entry in entries:
            check_density(path, entry.file_size, entry.compress_size)
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                shape, _, dtype = _HEADERS[version](file)
            if math.prod(shape) * dtype.itemsize > entry.file_size:
                raise FileError(
                    f"{path}: {entry.filename} is shorter than the {shape} it announces"
                )


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
