"""What the command line reads: a record to start from, and single conditions from their own files.

Legend: F frames, H rows, W columns.
"""

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from heartbeat_fast.conditions import NAMES, NUM_LABELS, Conditions
from heartbeat_fast.errors import FileError, HeartBeatError, MissingDependency, optional
from heartbeat_fast.files import check_pixels, readable
from heartbeat_fast.formats import open_record
from heartbeat_fast.record import Record

SOURCES = "heartbeat_fast.sources"  # entry points: record(seed, frames=, size=) -> Record
ARRAYS = (".npy", ".npz")
PICTURES = (".png", ".gif", ".webp", ".tif", ".tiff")
NIFTI = (".nii", ".nii.gz")


def sources() -> dict[str, Any]:
    """The installed record generators by name, as entry points not yet loaded."""
    return {point.name: point for point in entry_points(group=SOURCES)}


def open_source(spec: str, window: str | None, frames: int, size: int) -> Record:
    """The record of a file, or of NAME:SEED, a generator such as phantom:7; standardised.

    Args:
        window: "START:STOP", these frames only; None for all.
        frames, size: the clip's F, and its H = W in pixels.

    Raises:
        FileError: no such generator, a seed or window that is no number, or an unreadable file.
        MissingDependency: the generator needs a library that is not installed.
        RecordError: a number of frames that cannot stand for one beat.
    """
    record = _source(spec, frames, size)
    if window is not None:
        start, _, stop = window.partition(":")
        if not (start.isdecimal() and stop.isdecimal()):
            raise FileError(f"window: {window!r} came; wanted START:STOP, as in 12:40")
        record = record.window(int(start), int(stop))
    return record.standardised(frames, size)


def gather(
    given: dict[str, Any],
    record: Record | None,
    names: tuple[str, ...] | None,
    frames: int,
    size: int,
) -> Conditions:
    """One clip's conditions: those given one by one, then the record's.

    Args:
        given: text, ef, and files by condition name; None is not given.
        record: None where there is none; only what is wanted is extracted.
        names: which conditions; None for all there are.

    Raises:
        HeartBeatError: a condition is wrong, or named but not there.
    """
    wanted = NAMES if names is None else names
    values = {name: value for name, value in given.items() if value is not None and name in wanted}
    for name in values.keys() - {"text", "ef"}:
        values[name] = read_condition(name, values[name], frames, size)
    if record is not None:
        rest = [name for name in wanted if name not in values]
        found = record.conditions(rest if names is not None else None)
        values |= {name: getattr(found, name) for name in rest}
    conditions = Conditions(**values, frames=frames, size=size)
    return conditions if names is None else conditions.only(names)


def _source(spec: str, frames: int, size: int) -> Record:
    name, colon, seed = spec.partition(":")
    if not colon or Path(spec).exists():
        return open_record(spec)
    points = sources()
    if name not in points:
        known = ", ".join(f"{known}:SEED" for known in sorted(points)) or "none installed"
        raise FileError(f"{spec}: no such file, nor a source; sources: {known}")
    if not seed.isdecimal():
        raise FileError(f"{spec}: seed {seed!r} came; wanted a whole number, as in {name}:7")
    try:
        make = points[name].load()
    except ImportError as error:
        raise MissingDependency(
            f"{spec}: its source needs {error.name}: pip install 'heartbeat_fast[media]'"
        ) from error
    record: Record = make(int(seed), frames=frames, size=size)
    return record


def read_condition(name: str, path: str, frames: int, size: int) -> NDArray[Any]:
    """One of image, sketch, mask, skeleton, flow from its own file, as `Conditions` takes it.

    npy and npz arrays are taken as they are. Pictures, videos, DICOM and NIfTI are fitted to the
    clip (Record.standardised); in pictures and NIfTI given as mask, pixel values are the labels.

    Args:
        frames, size: the clip's F, and its H = W in pixels.

    Raises:
        FileError: missing, unreadable, or not a file this condition can come from.
        RecordError: a number of frames that cannot stand for the clip.
    """
    file = readable(path)
    try:
        if file.name.lower().endswith(ARRAYS):
            return _array(file, name)
        values = _labels(file) if name == "mask" else open_record(file).frames
        if name == "flow":
            raise FileError(f"{file}: pixels came; wanted flow as .npy or .npz (F,2,H,W)")
        if name in ("image", "sketch"):
            values = values[:1]
        return _fitted(name, values, 1 if len(values) == 1 else frames, size)
    except HeartBeatError:
        raise
    except Exception as error:  # a hostile file makes the libraries raise anything at all
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{file}: not readable as {name} ({line})") from error


def _array(file: Path, name: str) -> NDArray[Any]:
    loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded as archive:
        key = name if name in archive.files else archive.files[0]
        if key != name and len(archive.files) > 1:
            raise FileError(f"{file}: holds {', '.join(archive.files)}; wanted {name}")
        found: NDArray[Any] = archive[key]
        return found


def _labels(file: Path) -> NDArray[np.uint8]:
    """Labels (F,H,W) as stored: palettes and grey values are not brightness here."""
    if file.name.lower().endswith(NIFTI):
        volume = optional("nibabel", "formats").load(file)
        check_pixels(file, *volume.shape)
        values = np.atleast_3d(np.rint(np.asarray(volume.dataobj))).T  # on disk: column, row, time
    elif file.name.lower().endswith(PICTURES):
        with Image.open(file) as image:
            check_pixels(file, getattr(image, "n_frames", 1), image.height, image.width)
            frames = [np.asarray(frame) for frame in ImageSequence.Iterator(image)]
        if frames[0].ndim != 2:
            raise FileError(f"{file}: colours came; wanted one channel of labels 0 to 3")
        values = np.stack(frames)
    else:
        known = ", ".join((*ARRAYS, *PICTURES, *NIFTI))
        raise FileError(f"{file}: no labels in this kind of file; wanted one of {known}")
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high < NUM_LABELS:  # NaN fails too
        raise FileError(
            f"{file}: values {low:g} to {high:g} came; wanted labels 0 background, 1 LV cavity, "
            "2 myocardium, 3 left atrium"
        )
    return values.astype(np.uint8)


def _fitted(name: str, values: NDArray[np.uint8], frames: int, size: int) -> NDArray[Any]:
    if name == "mask":
        labels = Record(np.zeros_like(values), labels=values).standardised(frames, size).labels
        assert labels is not None
        return labels
    pixels = Record(values).standardised(frames, size).frames
    scaled = pixels.astype(np.float32) / 255
    return scaled[0] if name in ("image", "sketch") else scaled
