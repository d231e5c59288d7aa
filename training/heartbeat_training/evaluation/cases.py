"""Held-out patients (or phantoms) as evaluation needs them: clip, conditions, where to look.

Legend: F frames, H W pixels.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast import extract
from heartbeat_fast.anatomy import sample_anatomy
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.errors import RecordError
from heartbeat_fast.record import Record
from heartbeat_training import metrics, phantom
from heartbeat_training.datasets import layout_of, open_dataset
from heartbeat_training.datasets.base import ListedDataset
from heartbeat_training.evaluation.distances import EvaluationError

SPLITS = ("train", "test")
# dB from black to white. Files do not tell; it bends the figure of the real clip and of the
# generated one alike, and only their ratio is reported.
ASSUMED_RANGE = 60.0


@dataclass(frozen=True, eq=False)
class Case:
    """One held-out clip.

    Args:
        patient: resampling draws patients, not clips.
        record: standardised to the model's frames and size.
        conditions: all that the clip can give.
        flow: exact (phantoms) or extracted, (F, 2, H, W) pixels a frame.
        tissue: where speckle is judged, (F, H, W).
        dynamic_range: dB of the log compression, ASSUMED_RANGE where unknown.
    """

    patient: str
    record: Record
    conditions: Conditions
    flow: NDArray[np.float32]
    tissue: NDArray[np.bool_]
    dynamic_range: float = ASSUMED_RANGE

    @property
    def frames(self) -> NDArray[np.uint8]:
        """The real clip (F, H, W)."""
        return self.record.frames


def case_of(record: Record, patient: str = "", dynamic_range: float = ASSUMED_RANGE) -> Case:
    """A case of a standardised record. Raises: RecordError when its frames are not square."""
    conditions = record.conditions()
    flow = extract.flow(record.frames) if record.flow is None else record.flow
    labels = np.zeros_like(record.frames) if record.labels is None else record.labels
    return Case(
        patient or record.patient or record.source,
        record,
        conditions,
        flow,
        metrics.tissue(record.frames, labels),
        dynamic_range,
    )


def open_cases(
    data: str,
    split: str = "test",
    *,
    frames: int = 16,
    size: int = 256,
    hold_out: int = 0,
    limit: int | None = None,
) -> tuple[list[Case], list[str]]:
    """The clips of a split as cases, and one line for each clip that could not become one.

    data: a data set's folder, or "phantom:FIRST-LAST" (seeds, both included), which has no splits.
    hold_out: as `training_records`. limit: the first so many clips.

    Raises: EvaluationError when nothing is left; the data set's own errors.
    """
    cases: list[Case] = []
    refused: list[str] = []
    if seeds := phantom_seeds(data):
        for seed in seeds[:limit]:
            record = phantom.record(seed, speckle=1, frames=frames, size=size)
            cases.append(case_of(record, f"phantom {seed}", sample_anatomy(seed).dynamic_range))
        return cases, refused
    for record in _records(Path(data), split, hold_out):
        if limit is not None and len(cases) == limit:
            break
        try:
            cases.append(case_of(record.standardised(frames, size)))
        except RecordError as error:
            refused.append(f"{record.patient} {record.source}: {error}")
    if not cases:
        why = f"{len(refused)} are no single beat" if refused else "--hold-out N makes one"
        raise EvaluationError(f"{data}: no clip of split {split!r} can be used; {why}")
    return cases, refused


def training_records(data: str, hold_out: int = 0) -> Iterator[Record]:
    """All a training run on `data` may have seen, at native size: clips, and stills in CAMUS.

    hold_out: the last N patients with a clip, by name, are the test split, as in training
    (`real_data.RealData`); 0 takes the data set's own lists.
    """
    if seeds := phantom_seeds(data):
        return (phantom.record(seed) for seed in seeds)
    return _training(Path(data), hold_out)


def _training(folder: Path, hold_out: int) -> Iterator[Record]:
    yield from _records(folder, "train", hold_out)
    if layout_of(folder) == "camus":
        stills = open_dataset(folder, "stills")
        if not hold_out:
            yield from stills.records("train")
            return
        held = set(_names(open_dataset(folder))[-hold_out:])
        yield from stills.records([name for name in _names(stills) if name not in held])


def _records(folder: Path, split: str, hold_out: int) -> Iterator[Record]:
    if split not in SPLITS:
        raise EvaluationError(f"split: {split!r} came; wanted one of {', '.join(SPLITS)}")
    dataset = open_dataset(folder)
    if not hold_out:
        return dataset.records(split)
    names = _names(dataset)
    if len(names) <= hold_out:
        raise EvaluationError(f"{folder}: {len(names)} patients, of which {hold_out} held out")
    return dataset.records(names[-hold_out:] if split == "test" else names[:-hold_out])


def _names(dataset: ListedDataset) -> list[str]:
    """Patients with a clip, by name."""
    return sorted({entry.patient for entry in dataset.entries})


def phantom_seeds(data: str) -> range:
    """The seeds of "phantom:FIRST-LAST" or "phantom:SEED"; empty for anything else."""
    found = re.fullmatch(r"phantom:(\d+)(?:-(\d+))?", data)
    if not found:
        return range(0)
    first = int(found[1])
    seeds = range(first, int(found[2] or first) + 1)
    if not seeds:
        raise EvaluationError(f"{data}: runs backwards; wanted phantom:FIRST-LAST")
    return seeds


def given(case: Case, names: Iterable[str]) -> Conditions:
    """The case's conditions among `names`; what the clip cannot give is left out."""
    wanted = set(names)
    return case.conditions.only(n for n in NAMES if n in wanted & set(case.conditions.present))
