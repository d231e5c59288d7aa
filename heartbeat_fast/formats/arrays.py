"""NumPy archives, as `Clip.save("x.npz")` writes them: frames, spacing_mm, fps, conditions."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from heartbeat_fast.conditions import NUM_LABELS
from heartbeat_fast.errors import FileError
from heartbeat_fast.files import check_pixels
from heartbeat_fast.record import Record, view_in


def read(path: Path) -> Record:
    """`frames` uint8 (F,H,W), and where given spacing_mm, fps, ef, mask, skeleton, flow, text."""
    with zipfile.ZipFile(path) as archive:
        check_pixels(path, sum(entry.file_size for entry in archive.infolist()))
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
