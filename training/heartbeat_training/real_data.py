"""Real patients as training data: who learns, who is held out, and each clip slightly turned,
scaled and toned.

Held-out patients are kept from every stage. Rotation and scaling smear grain a little, so the codec
sees frames as they are and only the denoiser, whose latents hold no grain, sees changed ones.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.record import Record
from heartbeat_training.datasets import layout_of, open_dataset
from heartbeat_training.datasets.base import ListedDataset

TURN, SCALE, SHIFT, GAMMA = 8.0, 0.08, 8.0, 0.25  # degrees, share, pixels of 256, share: largest


class DataError(HeartBeatError):
    """A folder holds too few patients for what was asked."""


# What of a data set is a clip, and what a still with a better mask; kinds of `open_dataset`.
KINDS = {"camus": ("sequences", "stills"), "echonet": ("windows", "traced")}


class RealData:
    """Patients of a data set that stages may learn from, and those that none may see.

    Args:
        folder: a release or any folder of clips (docs/data.md).
        hold_out: how many patients with a clip, the last ones by name, are held out; None or 0 for
            the data set's own train and test lists.
        patients: only the first so many of the learners that have a clip; None for all, and those
            with stills only.
        view: "2CH" or "4CH" in CAMUS; None for all.

    Raises:
        DatasetError: the folder has no such layout. LeakError: a patient stands in two lists.
    """

    def __init__(
        self,
        folder: Path,
        hold_out: int | None = None,
        patients: int | None = None,
        view: str | None = None,
    ) -> None:
        self.folder, self.hold_out, self.patients = folder, hold_out, patients
        layout = layout_of(folder)
        options = {"view": view} if layout == "camus" else {}
        clip, still = KINDS.get(layout, (None, None))
        self._clips = open_dataset(folder, clip, **options)
        self._stills = open_dataset(folder, still, **options) if still else None

    @property
    def split_source(self) -> str:
        """Who held out whom."""
        if self.hold_out:
            return f"last {self.hold_out} patients with a clip held out"
        return self._clips.split_source

    def counts(self) -> tuple[int, int]:
        """Clips and stills to learn from; a patient may have one per view."""
        found = []
        for dataset, names in (
            (self._clips, self.learners()),
            (self._stills, self.still_learners()),
        ):
            wanted = set(names)
            found.append(sum(e.patient in wanted for e in dataset.entries) if dataset else 0)
        return found[0], found[1]

    def held_out(self) -> list[str]:
        """Patients for evaluation."""
        if self.hold_out:
            return _names(self._clips)[-self.hold_out :]
        return self._clips.splits()["test"]

    def learners(self) -> list[str]:
        """Patients whose clips are learned from.

        Raises: DataError when nobody is left.
        """
        if self.hold_out:
            names = _names(self._clips)[: -self.hold_out]
        else:
            names = self._clips.splits()["train"]
        if not names:
            raise DataError(f"{self.folder}: no patient with a clip is left to learn from")
        return names[: self.patients]

    def still_learners(self) -> list[str]:
        """Patients whose stills are learned from: all that are not held out, or the few."""
        if self._stills is None:
            return []
        here = _names(self._stills)
        if self.patients is not None:
            wanted = set(self.learners())
        elif self.hold_out:
            wanted = set(here) - set(self.held_out())
        else:
            wanted = set(self._stills.splits()["train"])
        return [name for name in here if name in wanted]

    def sequences(self) -> Iterator[Record]:
        """The learners' clips at native size."""
        return self._clips.records(self.learners())

    def stills(self) -> Iterator[Record]:
        """The learners' ED and ES as clips of two frames at native size."""
        names = self.still_learners()
        return self._stills.records(names) if self._stills is not None and names else iter(())


def _names(dataset: ListedDataset) -> list[str]:
    return sorted({entry.patient for entry in dataset.entries})


def still_pair(record: Record, size: int) -> Record:
    """A clip of two frames, each made (size, size): too short for `standardised` as a clip."""
    ed, es = (record.window(i, i + 1).standardised(1, size) for i in (0, 1))
    labels = [still.labels for still in (ed, es) if still.labels is not None]
    return replace(
        ed,
        frames=np.concatenate([ed.frames, es.frames]),
        labels=np.concatenate(labels) if len(labels) == 2 else None,
    )


def pairs(data: RealData, frames: int, size: int, variants: int) -> Iterator[Record]:
    """Clips of two frames for stage 1: the first gives sketch and image prior, either is learned.

    Per variant: each sequence's first frame with one of its others, each patient's ED and ES.
    """
    sequences = [record.standardised(frames, size) for record in data.sequences()]
    stills = [still_pair(record, size) for record in data.stills()]
    for variant in range(variants):
        for i, record in enumerate(sequences):
            rng = np.random.Generator(np.random.PCG64([variant, i]))
            yield changed(_two(record, int(rng.integers(1, len(record.frames)))), rng)
        for i, record in enumerate(stills):
            yield changed(record, np.random.Generator(np.random.PCG64([variant, i, 1])))


def _two(record: Record, other: int) -> Record:
    index = [0, other]
    labels = None if record.labels is None else record.labels[index]
    return replace(record, frames=record.frames[index], labels=labels, skeleton=None, flow=None)


def clips(data: RealData, frames: int, size: int, variants: int) -> Iterator[Record]:
    """Whole sequences for stage 2, each `variants` times changed; 0: once, as they are."""
    if not variants:
        yield from (record.standardised(frames, size) for record in data.sequences())
    for variant in range(variants):
        for i, record in enumerate(data.sequences()):
            rng = np.random.Generator(np.random.PCG64([variant, i, 2]))
            yield changed(record.standardised(frames, size), rng)


def plain_frames(data: RealData, size: int) -> NDArray[np.uint8]:
    """Frames (M, size, size) for the codec: of each sequence four, of each patient ED and ES."""
    every = [record.standardised(4, size).frames for record in data.sequences()]
    every += [still_pair(record, size).frames for record in data.stills()]
    return np.concatenate(every)


def changed(record: Record, rng: np.random.Generator) -> Record:
    """The record turned, scaled, shifted and toned as one: nothing is cut off on purpose."""
    size = record.frames.shape[-1]
    angle, scale = rng.uniform(-TURN, TURN), 1 + rng.uniform(-SCALE, SCALE)
    matrix = cv2.getRotationMatrix2D((size / 2, size / 2), angle, scale)
    matrix[:, 2] += rng.uniform(-SHIFT, SHIFT, 2) * size / 256
    tone = np.linspace(0, 1, 256) ** (1 + rng.uniform(-GAMMA, GAMMA)) * rng.uniform(0.85, 1.1)
    table = np.rint(np.clip(tone, 0, 1) * 255).astype(np.uint8)

    def warp(stack: NDArray[Any], how: int) -> NDArray[Any]:
        return np.stack([cv2.warpAffine(a, matrix, (size, size), flags=how) for a in stack])

    return replace(
        record,
        frames=table[warp(record.frames, cv2.INTER_LINEAR)],
        labels=None if record.labels is None else warp(record.labels, cv2.INTER_NEAREST),
        spacing_mm=(record.spacing_mm[0] / scale, record.spacing_mm[1] / scale),
    )
