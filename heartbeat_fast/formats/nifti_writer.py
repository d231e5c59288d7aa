"""A clip as NIfTI-1: axes column, row, slice, time; millimetres and seconds in the header."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.clip import MARK, Clip
from heartbeat_fast.errors import optional
from heartbeat_fast.files import atomic

COMMENT = 6  # code of a header extension of plain text


def write(path: Path, clip: Clip, *, mark: bool = False) -> None:
    """Writes .nii or .nii.gz; labels, where the clip has them, into `_gt` beside it, as CAMUS does.

    Args:
        mark: ignored; voxels are data, and the header says SYNTHETIC.

    Raises:
        FileError: a file cannot be written.
        MissingDependency: nibabel is not installed.
    """
    labels = clip.conditions.mask if clip.conditions else None
    if labels is not None:
        stem, dot, suffix = path.name.partition(".nii")
        _write(path.with_name(f"{stem}_gt{dot}{suffix}"), labels, clip)
    _write(path, clip.frames, clip)


def _write(path: Path, stack: NDArray[Any], clip: Clip) -> None:
    nibabel = optional("nibabel", "formats")
    voxels = np.ascontiguousarray(stack.astype(np.uint8).T[:, :, None])  # (W,H,1,F)
    image = nibabel.Nifti1Image(voxels, None)
    row, column = clip.spacing_mm
    image.header.set_zooms((column, row, 1.0, 1 / clip.fps))
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = f"{MARK}, not for diagnosis; heartbeat_fast".encode()
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension(COMMENT, clip.note().encode()))
    content = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        content = gzip.compress(content, 6, mtime=0)
    with atomic(path) as temporary:
        temporary.write_bytes(content)
