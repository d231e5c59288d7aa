"""M&Ms-1 (Campello et al., IEEE TMI 40(12), 2021): cardiac MR, short axis, for few-shot tuning.

`OpenDataset/{Training/Labeled,Training/Unlabeled,Validation,Testing}/<ID>/<ID>_sa[_gt].nii.gz`,
(x,y,z,t), and one CSV. HeartBeat tunes on 50 such volumes under the mask condition alone: slices
play the part of frames, so one record is one phase, resampled to 16 slices.
"""

import csv
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.conditions import FRAMES, NUM_LABELS
from heartbeat_fast.errors import FileError, optional
from heartbeat_fast.files import readable
from heartbeat_fast.formats.limits import reading
from heartbeat_fast.formats.nifti import values_of
from heartbeat_fast.record import Record
from heartbeat_training.datasets.base import DatasetError, Entry, ListedDataset

TABLE = "*_Dataset_information_diagnosis_opendataset.csv"
PARTS = {"train": "training", "validation": "validation", "test": "testing"}
CODE, ED, ES = "External code", "ED", "ES"
DARK, BRIGHT = 0.5, 99.5  # percentiles of a volume that become 0 and 255: MR has no fixed scale


class MnmsDataset(ListedDataset):
    """M&Ms-1: two records per labelled case, its ED volume and its ES volume.

    A record's frames are 16 slices (images linear between slices, labels nearest), its rows and
    columns those of the file: `Record.standardised` makes them 256×256 and keeps the aspect.
    Labels keep their numbers: 1 LV cavity, 2 myocardium as in CAMUS, 3 the **right ventricle**
    where CAMUS has the left atrium. fps has no meaning.

    Args:
        folder: `OpenDataset`, or the folder above it.
        splits: case codes by "train", "validation", "test" in place of the release's folders.

    Raises:
        DatasetError: not this layout.
        FileError: the CSV is unreadable.
    """

    def __init__(
        self, folder: str | Path, splits: Mapping[str, Iterable[str]] | None = None
    ) -> None:
        root = _root(Path(folder))
        phases, notes = _phases(root)
        images = {path.name.split("_")[0]: path for path in sorted(root.rglob("*_sa.nii.gz"))}
        # a case's labels may lie in another split than its image: J9L6N9's do
        labels = {path.name.split("_")[0]: path for path in sorted(root.rglob("*_sa_gt.nii.gz"))}
        entries = [
            Entry(f"{case} {phase}", case, partial(_volume, images[case], labels[case], case, t))
            for case, times in phases.items()
            if case in images and case in labels
            for phase, t in zip((ED, ES), times, strict=True)
        ]
        notes |= {
            "labelled cases without image": len(phases.keys() - images),
            "labelled cases without label file": len(phases.keys() & images - labels.keys()),
            "label files in another split's folder": sum(
                path.parent != images[case].parent
                for case, path in labels.items()
                if case in images and case in phases
            ),
        }
        lists, source = (splits, "own lists") if splits else (_lists(root), "official folders")
        super().__init__("mnms volumes", entries, lists, source, notes)


def recognises(folder: Path) -> bool:
    """True for a folder of this layout."""
    return any(base.is_dir() and any(base.glob(TABLE)) for base in (folder / "OpenDataset", folder))


def _root(folder: Path) -> Path:
    for base in (folder / "OpenDataset", folder):
        if base.is_dir() and any(base.glob(TABLE)):
            return base
    raise DatasetError(f"{folder}: no {TABLE} in it; wanted the M&Ms release, OpenDataset")


def _phases(root: Path) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """ED and ES by case, **0-based** as in the CSV; and what was left out, counted."""
    path = readable(next(root.glob(TABLE)))
    phases: dict[str, tuple[int, int]] = {}
    notes = {"unlabelled cases": 0, "rows without a code": 0}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {CODE, ED, ES} <= set(reader.fieldnames or ()):
                raise FileError(f"{path}: wanted columns {CODE}, {ED}, {ES}")
            for row in reader:
                case = (row[CODE] or "").strip()
                if not case:
                    notes["rows without a code"] += 1
                    continue
                try:
                    ed, es = int(float(row[ED] or "")), int(float(row[ES] or ""))
                except (ValueError, OverflowError) as error:
                    raise FileError(f"{path}: ED or ES of {case} is no number") from error
                if ed == es == 0 or (root / "Training/Unlabeled" / case).is_dir():
                    notes["unlabelled cases"] += 1
                else:
                    phases[case] = ed, es
    except (csv.Error, UnicodeDecodeError) as error:
        raise FileError(f"{path}: not readable as CSV ({error})") from error
    return phases, notes


def _lists(root: Path) -> dict[str, list[str]]:
    """Cases by the folder their image lies in."""
    lists: dict[str, list[str]] = {split: [] for split in PARTS}
    folders = {part: split for split, part in PARTS.items()}
    for path in sorted(root.rglob("*_sa.nii.gz")):
        split = folders.get(path.relative_to(root).parts[0].lower())
        if split is not None:
            lists[split].append(path.name.split("_")[0])
    return lists


def _volume(image: Path, labels: Path, case: str, t: int) -> Record:
    values, spacing = _phase(image, t)
    truth, _ = _phase(labels, t)
    if truth.shape != values.shape:
        raise FileError(f"{labels}: {truth.shape} came; wanted {values.shape} as {image.name}")
    truth = np.rint(truth)
    if not (truth.min() >= 0 and truth.max() < NUM_LABELS):  # NaN fails both
        raise FileError(f"{labels}: labels {truth.min():g} to {truth.max():g}; wanted 0 to 3")
    if not truth.any():
        raise FileError(f"{labels}: volume {t} holds no label; wanted a labelled phase")
    if not np.isfinite(values).all():
        raise FileError(f"{image}: NaN or infinite pixels came; wanted finite numbers")
    low, high = np.percentile(values, (DARK, BRIGHT))
    grey = np.clip((values - low) / max(high - low, 1e-6), 0, 1) * np.float32(255)
    z = np.linspace(0, len(grey) - 1, FRAMES)
    below = np.floor(z).astype(int)
    above = np.minimum(below + 1, len(grey) - 1)
    share = (z - below)[:, None, None]
    return Record(
        frames=np.rint(grey[below] * (1 - share) + grey[above] * share).astype(np.uint8),
        labels=truth[z.round().astype(int)].astype(np.uint8),
        spacing_mm=spacing,
        patient=case,
        source=f"{image.name} volume {t}",
    )


def _phase(path: Path, t: int) -> tuple[NDArray[Any], tuple[float, float]]:
    """One volume (slices, rows, columns) of a file (x,y,z,t), and its in-plane spacing."""
    readable(path)
    with reading(path, "nifti"):
        image = optional("nibabel", "formats").load(path)
        if len(image.shape) != 4 or not 0 <= t < image.shape[3]:
            raise FileError(f"{path}: {image.shape} came; wanted (x,y,z,t) with volume {t} in it")
        column, row = (float(zoom) for zoom in image.header.get_zooms()[:2])
        return values_of(path, image, volume=t).T.astype(np.float32), (row, column)
