"""Real patients as training data: who learns, who is held out, and each clip slightly turned,
scaled and toned.

Held-out patients are kept from every stage. Rotation and scaling smear grain a little, so the codec
sees frames as they are and only the denoiser, whose latents hold no grain, sees changed ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.formats import open_record
from heartbeat_fast.record import Record

TURN, SCALE, SHIFT, GAMMA = 8.0, 0.08, 8.0, 0.25  # degrees, share, pixels of 256, share: largest


class DataError(HeartBeatError):
    """A folder holds too few patients for what was asked."""


@dataclass(frozen=True)
class RealData:
    """Patients of a folder in CAMUS' layout.

    Args:
        folder: holds patientXXXX/ or database_nifti/patientXXXX/.
        hold_out: how many of the patients with a sequence, the last ones, no stage may see.
        patients: only the first so many of the others that have a sequence; None for all, and
            those with ED and ES stills only.
    """

    folder: Path
    hold_out: int = 20
    patients: int | None = None

    def held_out(self) -> list[str]:
        """Patients for evaluation."""
        return self._with_sequence()[-self.hold_out :] if self.hold_out else []

    def sequences(self) -> list[Path]:
        """Half sequences to learn from."""
        names = self._with_sequence()[: -self.hold_out or None][: self.patients]
        if not names:
            raise DataError(f"{self.folder}: no half sequence is left to learn from")
        return [self._root / n / f"{n}_4CH_half_sequence.nii.gz" for n in names]

    def stills(self) -> list[tuple[Path, Path]]:
        """(ED, ES) files to learn from."""
        names = {file.parent.name for file in self.sequences()}
        if self.patients is None:
            kept_out = set(self.held_out())
            names = {p.name for p in self._root.glob("patient*")} - kept_out
        pairs = [
            tuple(self._root / n / f"{n}_4CH_{phase}.nii.gz" for phase in ("ED", "ES"))
            for n in sorted(names)
        ]
        return [(ed, es) for ed, es in pairs if ed.is_file() and es.is_file()]

    @property
    def _root(self) -> Path:
        inner = self.folder / "database_nifti"
        return inner if inner.is_dir() else self.folder

    def _with_sequence(self) -> list[str]:
        files = self._root.glob("patient*/patient*_4CH_half_sequence.nii.gz")
        return sorted(file.parent.name for file in files)


def still_pair(files: tuple[Path, Path], size: int) -> Record:
    """ED and ES of a patient as a clip of two frames (2, size, size)."""
    ed, es = (open_record(file).standardised(1, size) for file in files)
    assert ed.labels is not None
    assert es.labels is not None
    return replace(
        ed,
        frames=np.concatenate([ed.frames, es.frames]),
        labels=np.concatenate([ed.labels, es.labels]),
    )


def pairs(data: RealData, frames: int, size: int, variants: int) -> Iterator[Record]:
    """Clips of two frames for stage 1: the first gives sketch and image prior, either is learned.

    Per variant: each sequence's first frame with one of its others, each patient's ED and ES.
    """
    sequences = [open_record(file).standardised(frames, size) for file in data.sequences()]
    stills = [still_pair(files, size) for files in data.stills()]
    for variant in range(variants):
        for i, record in enumerate(sequences):
            rng = np.random.Generator(np.random.PCG64([variant, i]))
            other = int(rng.integers(1, len(record.frames)))
            assert record.labels is not None
            index = [0, other]
            two = replace(record, frames=record.frames[index], labels=record.labels[index])
            yield changed(two, rng)
        for i, record in enumerate(stills):
            yield changed(record, np.random.Generator(np.random.PCG64([variant, i, 1])))


def clips(data: RealData, frames: int, size: int, variants: int) -> Iterator[Record]:
    """Whole sequences for stage 2, each `variants` times changed."""
    for variant in range(variants):
        for i, file in enumerate(data.sequences()):
            rng = np.random.Generator(np.random.PCG64([variant, i, 2]))
            yield changed(open_record(file).standardised(frames, size), rng)


def plain_frames(data: RealData, size: int) -> NDArray[np.uint8]:
    """Frames (M, size, size) for the codec: of each sequence four, of each patient ED and ES."""
    every = [open_record(file).standardised(4, size).frames for file in data.sequences()]
    every += [still_pair(files, size).frames for files in data.stills()]
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
