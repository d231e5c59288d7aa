"""Readers: one small file per kind, each with `read(path) -> Record`, chosen by suffix."""

from importlib import import_module
from pathlib import Path

from heartbeat_fast.errors import FileError
from heartbeat_fast.files import readable
from heartbeat_fast.formats.limits import reading
from heartbeat_fast.record import Record

_READERS = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".dcm": "dicom",
    ".mp4": "video",
    ".avi": "video",
    ".mov": "video",
    ".mkv": "video",
    ".webm": "video",
    ".gif": "picture",
    ".webp": "picture",
    ".png": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
    ".npz": "arrays",
}
SUFFIXES = tuple(_READERS)


def open_record(path: str | Path) -> Record:
    """Reads a clip or an image, at its own size and frame rate, in grey.

    Labels come from a `_gt` file beside a NIfTI file, and from the mask of an npz. Spacing is
    1 mm and fps 30 where the file does not say.

    Raises:
        FileError: missing, unreadable, too large, or of an unknown kind.
        MissingDependency: names the extra that brings the library for this kind.
    """
    path = readable(path)
    kind = _kind(path)
    with reading(path, kind):
        record: Record = import_module(f"{__name__}.{kind}").read(path)
    return record


def _kind(path: Path) -> str:
    name = path.name.lower()
    for suffix, kind in _READERS.items():
        if name.endswith(suffix):
            return kind
    with path.open("rb") as file:
        if file.read(132)[128:] == b"DICM":  # DICOM files often have no suffix
            return "dicom"
    raise FileError(f"{path}: unknown kind of file; wanted one of {', '.join(SUFFIXES)}")
