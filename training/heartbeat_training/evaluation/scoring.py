"""One model on one set of held-out patients: clips for a set of conditions, and all their figures.

Legend: B clips, F frames, H W pixels.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.generator import Generator
from heartbeat_training.evaluate import Judge
from heartbeat_training.evaluation.cases import Case, given
from heartbeat_training.evaluation.clips import REAL, diversity, figures, summarise
from heartbeat_training.evaluation.distances import (
    FEWEST,
    EvaluationError,
    Features,
    Measured,
    frechet,
    kid,
    measure,
)
from heartbeat_training.evaluation.features import ImageFeatures, VideoFeatures
from heartbeat_training.evaluation.generate import Sampling, make
from heartbeat_training.evaluation.lpips import Lpips

Frames = NDArray[np.uint8]
Tick = Callable[[], None]
FRAMES_OF_PAPER = 16  # FVD over this is what the paper seems to print


class Scorer:
    """Keeps what all sets of conditions share: the real clips' figures and features."""

    def __init__(
        self,
        generator: Generator,
        cases: list[Case],
        *,
        images: ImageFeatures,
        video: VideoFeatures,
        judge: Judge | None = None,
        lpips: Lpips | None = None,
    ) -> None:
        """Raises: EvaluationError for too few patients, before any clip is made."""
        if len({case.patient for case in cases}) < FEWEST:
            raise EvaluationError(f"patients: fewer than {FEWEST} came; distances need so many")
        self.generator, self.cases, self.judge, self.lpips = generator, cases, judge, lpips
        self.images, self.video = images, video
        self.made: dict[str, list[Frames]] = {}  # by set of conditions: each case's first clip

    @cached_property
    def real(self) -> list[dict[str, Any]]:
        """The sources' own figures: the judge's ceiling and texture's yardstick, a row a case."""
        return [
            {"patient": case.patient, "set": REAL}
            | figures(case, case.frames, self.judge, self.lpips)
            for case in self.cases
        ]

    @cached_property
    def _real_features(self) -> tuple[Features, Features]:
        return self._features([case.frames for case in self.cases])

    @cached_property
    def ceiling(self) -> dict[str, dict[str, float]]:
        """Summary of the real clips: what the judge finds in them; how far patients differ."""
        found = summarise(self.real)
        found["diversity"]["mean"] = diversity([case.frames for case in self.cases])
        return found

    def score(
        self, name: str, conditions: Iterable[str], sampling: Sampling, tick: Tick = lambda: None
    ) -> dict[str, Any]:
        """Generate for every case and measure.

        Returns {"conditions", "lacking", "summary", "distances", "rows"}; `lacking` counts the
        cases that could not give a condition. Distances take each case's first seed alone, so that
        both sides have the same number of clips.

        Raises: as the generator does.
        """
        wanted = tuple(conditions)
        rows, first, lacking = [], [], dict.fromkeys(wanted, 0)
        for i, (case, real) in enumerate(zip(self.cases, self.real, strict=True)):
            own = given(case, wanted)
            for condition in set(wanted) - set(own.present):
                lacking[condition] += 1
            drawn: list[Frames] = []
            for seed in sampling.seeds_of(i):
                frames, seconds = make(self.generator, own, sampling, seed)
                drawn.append(frames)
                row = figures(case, frames, self.judge, self.lpips, real)
                rows.append({"patient": case.patient, "set": name, "seed": seed} | row)
                rows[-1]["seconds"] = seconds
                tick()
            rows[-1]["diversity"] = diversity(drawn)
            first.append(drawn[0])
        self.made[name] = first
        return {
            "conditions": wanted,
            "lacking": {key: count for key, count in lacking.items() if count},
            "summary": summarise(rows),
            "distances": self._distances(first),
            "rows": rows,
        }

    def _distances(self, clips: list[Frames]) -> dict[str, dict[str, float]]:
        """FID and KID of frames, FVD of clips, FVD/16, each as `Measured`."""
        real, fake = self._real_features, self._features(clips)
        patients = np.array([case.patient for case in self.cases])
        each = np.repeat(patients, [len(clip) for clip in clips])
        fvd = measure(frechet, real[1], fake[1], patients)
        found = {
            "fid": measure(frechet, real[0], fake[0], each),
            "kid": measure(kid, real[0], fake[0], each),
            "fvd": fvd,
            "fvd_16": _divided(fvd, FRAMES_OF_PAPER),
        }
        return {name: asdict(distance) for name, distance in found.items()}

    def _features(self, clips: list[Frames]) -> tuple[Features, Features]:
        """Of frames (B·F, D) and of clips (B, D)."""
        return self.images(np.concatenate(clips)), self.video(np.stack(clips))

    def about(self) -> dict[str, Any]:
        """How distances and LPIPS were measured, for result files."""
        return {
            "image_features": {"name": self.images.name, "comparable": self.images.comparable},
            "video_features": {"name": self.video.name, "comparable": self.video.comparable},
            "lpips": self.lpips.name if self.lpips else None,
            "clips": len(self.cases),
            "patients": len({case.patient for case in self.cases}),
        }


def _divided(m: Measured, by: float) -> Measured:
    return Measured(m.value / by, m.low / by, m.high / by, m.floor / by, m.floor_n, m.n)
