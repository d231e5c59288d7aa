"""Reads every clip of a data set once and says what is there, and what is wrong with it."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from heartbeat_fast.errors import FileError
from heartbeat_fast.record import Record
from heartbeat_training.datasets.base import ListedDataset, leaks

Range = tuple[float, float]


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Args:
        name, split_source: as of the data set.
        clips: readable clips by split ("none" for patients in no list), then by view.
        patients: with readable clips, by split.
        labels: values that occur in masks; unlabelled: clips without masks.
        spacing_mm, fps, frames, height, width, ef: smallest and largest over clips; ef of those
            that have one; None without clips.
        odd: unreadable or contradictory clips by name, with the reason.
        duplicates: names of clips with equal frames.
        leaks: patients in more than one split, with those splits.
        notes: counted, not wrong.
    """

    name: str
    split_source: str
    clips: dict[str, dict[str, int]]
    patients: dict[str, int]
    labels: list[int]
    unlabelled: int
    spacing_mm: Range | None
    fps: Range | None
    frames: Range | None
    height: Range | None
    width: Range | None
    ef: Range | None
    odd: dict[str, str]
    duplicates: list[list[str]]
    leaks: dict[str, list[str]]
    notes: dict[str, int]

    @property
    def ok(self) -> bool:
        """True when there are clips, and nothing is odd, doubled or leaking."""
        return bool(self.clips) and not (self.odd or self.duplicates or self.leaks)

    def as_json(self) -> dict[str, Any]:
        """Plain dicts and lists, `ok` among them."""
        return {"ok": self.ok, **asdict(self)}


def check(dataset: ListedDataset) -> Report:
    """Opens every clip, one at a time in memory; an unreadable one is noted, not raised."""
    splits: dict[str, list[str]] = {}
    for split, listed in dataset.lists.items():
        for patient in dict.fromkeys(listed):
            splits.setdefault(patient, []).append(split)
    clips: Counter[tuple[str, str]] = Counter()
    patients: dict[str, set[str]] = {}
    odd: dict[str, str] = {}
    same: dict[str, list[str]] = {}
    facts = _Facts()
    for entry in dataset.entries:
        try:
            record = entry.open()
        except FileError as error:
            odd[entry.name] = str(error)
            continue
        for split in splits.get(entry.patient, ["none"]):
            clips[split, record.view] += 1
            patients.setdefault(split, set()).add(entry.patient)
        same.setdefault(_content(record), []).append(entry.name)
        facts.add(record)
    table: dict[str, dict[str, int]] = {}
    for (split, view), count in sorted(clips.items()):
        table.setdefault(split, {})[view] = count
    return Report(
        name=dataset.name,
        split_source=dataset.split_source,
        clips=table,
        patients={split: len(found) for split, found in sorted(patients.items())},
        labels=sorted(facts.labels),
        unlabelled=facts.unlabelled,
        **{name: _range(facts.numbers[name]) for name in _Facts.NAMES},
        odd=odd,
        duplicates=[names for names in same.values() if len(names) > 1],
        leaks=leaks(dataset.lists),
        notes=dataset.notes,
    )


class _Facts:
    """Numbers gathered over clips."""

    NAMES = ("spacing_mm", "fps", "frames", "height", "width", "ef")

    def __init__(self) -> None:
        self.labels: set[int] = set()
        self.unlabelled = 0
        self.numbers: dict[str, list[float]] = {name: [] for name in self.NAMES}

    def add(self, record: Record) -> None:
        F, H, W = record.frames.shape
        found = (record.spacing_mm, (record.fps,), (F,), (H,), (W,))
        ef = () if record.ef is None else (record.ef,)
        for name, numbers in zip(self.NAMES, (*found, ef), strict=True):
            self.numbers[name].extend(numbers)
        if record.labels is None:
            self.unlabelled += 1
        else:
            self.labels |= set(np.unique(record.labels).tolist())


def _range(numbers: Iterable[float]) -> Range | None:
    found = list(numbers)
    return (min(found), max(found)) if found else None


def _content(record: Record) -> str:
    digest = hashlib.sha256(repr(record.frames.shape).encode())
    digest.update(np.ascontiguousarray(record.frames).data)
    return digest.hexdigest()
