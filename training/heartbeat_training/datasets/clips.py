"""Any folder of clips (DICOM, NIfTI, video, ...) as a data set, split by a hash of the patient."""

import hashlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from heartbeat_fast.errors import FileError
from heartbeat_fast.formats import SUFFIXES, dicom, open_record
from heartbeat_fast.record import Record
from heartbeat_training.datasets.base import SPLITS, DatasetError, Entry, ListedDataset

SHARES = (80, 10, 10)  # percent of patients in train, validation, test


class ClipFolder(ListedDataset):
    """Every readable file below a folder, one record each.

    The patient is DICOM's PatientID, hashed; else the first folder below `folder`; else, for a file
    that lies in `folder` itself, its name up to the first underscore. Too few patients are safe,
    too many are a leak: name folders after patients.

    Args:
        folder: of clips; `_gt` label files go with their image.
        splits: patient ids by "train", "validation", "test" in place of the hash's.

    Raises:
        DatasetError: no folder, or no clip in it.
    """

    def __init__(
        self, folder: str | Path, splits: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        root = Path(folder)
        paths = [path for path in sorted(root.rglob("*")) if path.is_file() and _is_clip(path)]
        if not paths:
            raise DatasetError(f"{root}: no clip in it; wanted files of {', '.join(SUFFIXES)}")
        entries = [
            Entry(str(path.relative_to(root)), patient, partial(_clip, path, patient))
            for path in paths
            for patient in [_patient(path, root)]
        ]
        patients = dict.fromkeys(entry.patient for entry in entries)
        hashed = {split: [p for p in patients if split_of(p) == split] for split in SPLITS}
        source = "own lists" if splits else "hash of the patient"
        super().__init__("folder clips", entries, splits or hashed, source)


def split_of(patient: str) -> str:
    """The split of a patient, the same in every folder, on every machine, for ever."""
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % 100
    for split, end in zip(SPLITS, (SHARES[0], SHARES[0] + SHARES[1], 100), strict=True):
        if place < end:
            return split
    raise AssertionError("shares end at 100")


def _is_clip(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith("."):
        return False
    if name.endswith(SUFFIXES):
        return not name.endswith(("_gt.nii", "_gt.nii.gz"))
    return _is_dicom(path)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() == ".dcm":
        return True
    with path.open("rb") as file:  # DICOM files often have no suffix, or a UID's dots
        return not path.name.lower().endswith(SUFFIXES) and file.read(132)[128:] == b"DICM"


def _patient(path: Path, root: Path) -> str:
    known = ""
    if _is_dicom(path):
        with suppress(FileError):  # reading it will name it; one bad file must not close the rest
            known = dicom.patient(path)
    parts = path.relative_to(root).parts
    return known or (parts[0] if len(parts) > 1 else path.name.split(".")[0].split("_")[0])


def _clip(path: Path, patient: str) -> Record:
    return replace(open_record(path), patient=patient)
