"""NIfTI in the layout of CAMUS (Leclerc et al., IEEE TMI 38(9), 2019), and with a time axis.

`patient0001_4CH_half_sequence.nii.gz`, its labels `..._gt.nii.gz` and `Info_4CH.cfg` beside it.
"""

import gzip
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.conditions import NUM_LABELS
from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import check_pixels
from heartbeat_fast.record import Record, view_in

CHUNK = 2**24  # bytes read at once
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
CFG = 2**16  # characters; real ones hold some 90


def read(path: Path) -> Record:
    """One image or sequence, upright, from end-diastole to end-systole where the cfg tells."""
    stem, suffix = re.fullmatch(r"(.*?)(\.nii(?:\.gz)?)", path.name, re.I).groups()  # type: ignore[union-attr]
    if stem.endswith("_gt"):
        raise FileError(f"{path}: holds labels; wanted the image beside it, {stem[:-3]}{suffix}")
    values, spacing, rate = _upright(path)
    labels = None
    labels_path = path.with_name(f"{stem}_gt{suffix}")
    if labels_path.is_file():
        labels = _labels(labels_path, values.shape)
    view = re.search(r"[24]CH", stem)
    info = _info(path.with_name(f"Info_{view[0]}.cfg")) if view else {}
    frames = _grey(path, values)
    if info.get("ED", 0) > info.get("ES", np.inf):  # a few clips of the release run backwards
        frames = frames[::-1]
        labels = None if labels is None else labels[::-1]
    return Record(
        frames=np.ascontiguousarray(frames),
        labels=None if labels is None else np.ascontiguousarray(labels),
        spacing_mm=spacing,
        fps=info.get("FrameRate", rate),
        view=view_in(stem),
        ef=info.get("EF"),
        patient=stem.split("_")[0],
        source=path.name,
    )


def _upright(path: Path) -> tuple[NDArray[Any], tuple[float, float], float]:
    """Values (F,H,W), spacing (rows, columns), frames per second.

    On disk the axes are column, row, time, as in CAMUS, or column, row, one slice, time.
    """
    image = optional("nibabel", "formats").load(path)
    shape = tuple(image.shape)
    if len(shape) not in (2, 3) and not (len(shape) == 4 and shape[2] == 1):
        raise FileError(f"{path}: {shape} came; wanted (W,H), (W,H,F) or (W,H,1,F)")
    values = values_of(path, image).reshape(*shape[:2], -1, order="F")
    zooms = [float(zoom) for zoom in image.header.get_zooms()]
    seconds = _SECONDS.get(image.header.get_xyzt_units()[1], 0.0) * (
        zooms[3] if len(zooms) == 4 else 0.0
    )
    return values.T, (zooms[1], zooms[0]), 1 / seconds if seconds > 0 else 30.0


def values_of(path: Path, image: Any, volume: int | None = None) -> NDArray[Any]:
    """The numbers of a NIfTI-1 file, axes as on disk, scaled as its header says.

    Memory grows with the bytes that are there, never with those a header announces.

    Args:
        image: this file, as nibabel opens it.
        volume: of a 4-D file, the one (x,y,z) wanted; the rest is passed over, not kept.

    Raises:
        FileError: too large, cut short, or its numbers are of no kind for an image.
    """
    stored = image.dataobj
    shape, dtype, offset = stored.shape, stored.dtype, int(stored.offset)
    if dtype.kind not in "iuf" or offset < 0:
        raise FileError(f"{path}: numbers of type {dtype} at byte {offset}; wanted grey values")
    if volume is not None:
        check_pixels(path, *shape)
        offset += volume * math.prod(shape[:3]) * dtype.itemsize
        shape = shape[:3]
    check_pixels(path, *shape)
    wanted = math.prod(shape) * dtype.itemsize
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        file.seek(offset)
        data = bytearray()
        while len(data) < wanted:
            piece = file.read(min(wanted - len(data), CHUNK))
            if not piece:
                raise FileError(f"{path}: ends after {len(data)} of {wanted} bytes of values")
            data += piece
        if volume is None:
            file.read(1)  # past the end gzip compares its checksum: damage inside is found
    values = np.ndarray(shape, dtype, data, order="F")
    if (stored.slope, stored.inter) == (1.0, 0.0):
        return values
    return values * np.float32(stored.slope) + np.float32(stored.inter)


def _grey(path: Path, values: NDArray[Any]) -> NDArray[np.uint8]:
    if not np.isfinite(values).all():
        raise FileError(f"{path}: NaN or infinite pixels came; wanted finite numbers")
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 255 or (high <= 1 and values.dtype.kind == "f"):
        values = (values - min(low, 0)) * (255 / max(high - min(low, 0), 1e-6))
    return np.rint(values).astype(np.uint8)


def _labels(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    values, _, _ = _upright(path)
    if values.shape != shape:
        raise FileError(f"{path}: {values.shape} came; wanted {shape} as the image beside it")
    labels = np.rint(values)  # the release stores sequence labels as float32
    if not (labels.min() >= 0 and labels.max() < NUM_LABELS):  # NaN fails both
        raise FileError(f"{path}: labels {labels.min():g} to {labels.max():g}; wanted 0 to 3")
    return labels.astype(np.uint8)


def cfg(path: Path) -> dict[str, str]:
    """`Key: value` lines of an Info cfg, split at the first colon; {} where there is no file."""
    if not path.is_file():
        return {}
    with path.open(errors="replace") as file:
        lines = file.read(CFG).splitlines()
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, colon, value in pairs if colon}


def _info(path: Path) -> dict[str, float]:
    """The numbers among them."""
    number = re.compile(r"\d+(\.\d*)?")
    return {key: float(value) for key, value in cfg(path).items() if number.fullmatch(value)}
