"""MetaImage (.mhd beside .raw), as CAMUS was first released: pixels twice as wide as high."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heartbeat_fast.conditions import NUM_LABELS
from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import check_pixels, readable
from heartbeat_fast.formats.limits import reading
from heartbeat_fast.record import Record

HEADER = 2**14  # bytes; real ones hold some 300
BYTES = {"MET_UCHAR": 1, "MET_USHORT": 2, "MET_SHORT": 2, "MET_FLOAT": 4, "MET_DOUBLE": 8}


def read(path: Path) -> Record:
    """An image or a sequence with square pixels, and its labels from `_gt.mhd` where there are any.

    Columns or rows of the finer spacing are averaged to the coarser one (labels nearest): nothing
    is invented.

    Raises:
        FileError: unreadable, too large, or labels are not 0 to 3 on the image's grid.
    """
    values, spacing = _values(path)
    if not (values.min() >= 0 and values.max() <= 255):
        raise FileError(f"{path}: pixels {values.min():g} to {values.max():g}; wanted 0 to 255")
    labels = None
    labels_path = path.with_name(f"{path.stem}_gt.mhd")
    if labels_path.is_file():
        labels, _ = _values(labels_path)
        if labels.shape != values.shape:
            raise FileError(f"{labels_path}: {labels.shape} came; wanted {values.shape}")
        if not (labels.min() >= 0 and labels.max() < NUM_LABELS):
            raise FileError(
                f"{labels_path}: labels {labels.min():g} to {labels.max():g}; wanted 0 to 3"
            )
    coarse = max(spacing)
    size = tuple(
        max(round(n * mm / coarse), 1) for n, mm in zip(values.shape[1:], spacing, strict=True)
    )
    frames = np.rint(values).astype(np.uint8)
    return Record(
        frames=_resize(frames, size, Image.Resampling.BOX),
        labels=None
        if labels is None
        else _resize(np.rint(labels).astype(np.uint8), size, Image.Resampling.NEAREST),
        spacing_mm=(coarse, coarse),
        source=path.name,
    )


def _values(path: Path) -> tuple[NDArray[Any], tuple[float, float]]:
    """Values (F,H,W) and spacing (rows, columns) in mm."""
    _check(readable(path))
    with reading(path, "MetaImage"):
        itk = optional("SimpleITK", "train")
        image = itk.ReadImage(str(path), imageIO="MetaImageIO")
        column, row = image.GetSpacing()[:2]
        values = itk.GetArrayFromImage(image)
    if not (np.isfinite([column, row]).all() and min(column, row) > 0):
        raise FileError(f"{path}: spacing {column}, {row} came; wanted positive millimetres")
    return (values if values.ndim == 3 else values[None]), (row, column)


def _check(path: Path) -> None:
    """Holds the header to the file it names, which must lie beside it: it can name any path."""
    with path.open("rb") as file:
        text = file.read(HEADER).decode("latin-1")
    lines = (line.partition("=") for line in text.splitlines())
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("ElementDataFile", "")
    if not name.lower().endswith((".raw", ".zraw")) or Path(name).name != name or "%" in name:
        raise FileError(f"{path}: ElementDataFile is {name!r}; wanted a .raw file beside it")
    kind = fields.get("ElementType", "")
    try:
        shape = [int(n) for n in fields["DimSize"].split()]
    except (KeyError, ValueError) as error:
        raise FileError(
            f"{path}: DimSize is missing or no numbers; wanted columns, rows"
        ) from error
    if kind not in BYTES or len(shape) not in (2, 3) or fields.get("CompressedData") == "True":
        raise FileError(f"{path}: {kind} {shape} came; wanted plain (W,H) or (W,H,F)")
    check_pixels(path, *shape)
    stored = readable(path.with_name(name)).stat().st_size
    if stored < np.prod(shape) * BYTES[kind]:
        raise FileError(f"{path}: announces {shape} {kind}, {name} has {stored} bytes")


def _resize(
    stack: NDArray[np.uint8], size: tuple[int, ...], how: Image.Resampling
) -> NDArray[np.uint8]:
    if stack.shape[1:] == size:
        return stack
    rows, columns = size
    return np.stack([np.asarray(Image.fromarray(a).resize((columns, rows), how)) for a in stack])
