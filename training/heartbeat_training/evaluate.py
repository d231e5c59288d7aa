"""A generator against held-out phantoms: what was asked for, what came, how far from the ceiling.

Each held-out heart is imaged twice, under two speckles: the source, which gives the conditions, and
its twin, which is what a perfect generator would make of them. Every figure of the generated clip
stands beside the twin's. Legend: F frames, H W pixels; figures as in metrics.py.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import sample_anatomy
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.generator import Generator
from heartbeat_fast.record import Record
from heartbeat_training import metrics
from heartbeat_training.phantom import record

# Frames (F, H, W) uint8 → labels (F, H, W): segmenter.segment with its model bound, or any other.
Judge = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

HELD_OUT = range(900_000, 900_032)  # no training run and no segmenter has seen these hearts

# The paper's ablation, one condition more in each row; then a frame and an EF, which is what other
# echo generators take; then all of ours; then a foreign mask.
LADDER = {
    "text": ("text",),
    "+image": ("text", "image"),
    "+sketch": ("text", "image", "sketch"),
    "+mask": ("text", "image", "sketch", "mask"),
    "+skeleton": ("text", "image", "sketch", "mask", "skeleton"),
    "+flow": ("text", "image", "sketch", "mask", "skeleton", "flow"),
}
ALL, SWAPPED = "all", "mask swapped"
FRAME = "image and EF"
SETS = {**LADDER, FRAME: ("ef", "image"), ALL: NAMES, SWAPPED: NAMES}


@dataclass(frozen=True)
class Case:
    """One held-out heart: source and twin, what the source gives as conditions, where to look."""

    seed: int
    source: Record
    twin: Record
    conditions: Conditions
    tissue: NDArray[np.bool_]
    dynamic_range: float  # dB, of the phantom's log compression

    @property
    def labels(self) -> NDArray[np.uint8]:
        """Exact labels (F, H, W)."""
        assert self.source.labels is not None
        return self.source.labels

    @property
    def flow(self) -> NDArray[np.float32]:
        """Exact flow (F, 2, H, W)."""
        assert self.source.flow is not None
        return self.source.flow


def open_case(seed: int, frames: int = 16, size: int = 256) -> Case:
    """Image a held-out heart under speckles 1 and 2."""
    source, twin = (record(seed, speckle=k, frames=frames, size=size) for k in (1, 2))
    assert source.labels is not None
    return Case(
        seed,
        source,
        twin,
        source.conditions(NAMES),
        metrics.tissue(source.frames, source.labels),
        sample_anatomy(seed).dynamic_range,
    )


def measure(
    case: Case, other: Case, frames: NDArray[np.uint8], seen: NDArray[np.uint8]
) -> dict[str, Any]:
    """All figures of one clip made for a case; NaN where the case has no tissue to judge.

    frames (F, H, W) and the labels a judge has seen in them; `other` is any other heart.
    """
    return {
        "ssim": metrics.ssim(frames, case.source.frames),
        "dice": metrics.dice(seen, case.labels),
        "dice_other": metrics.dice(seen, other.labels),
        "overlap": metrics.dice(case.labels, other.labels),
        "ef_asked": metrics.ef_area_length(case.labels),
        "ef": metrics.ef_area_length(seen),
        "spectrum_db": metrics.power_spectrum(frames, case.tissue).tolist(),
        "speckle_ratio": metrics.speckle_ratio(frames, case.tissue, case.dynamic_range),
        "travel": metrics.speckle_correlation(frames, case.flow, case.tissue),
        "flicker": metrics.flicker(frames, case.flow, case.tissue),
        "flow_error": metrics.flow_error(frames, case.flow, case.tissue),
    }


def evaluate(
    generator: Generator,
    judge: Judge,
    *,
    seeds: range = HELD_OUT,
    sets: tuple[str, ...] = tuple(SETS),
    steps: int = 10,
    guidance: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Rows of raw figures, one per clip: {"seed", "set", figures…}.

    The sets "source" and "twin" come first for each seed: the references that need no generator.
    `dice_other` is Dice against the next heart's masks, `overlap` that of the two hearts' masks
    themselves. In "mask swapped" the next heart's mask takes the own one's place.
    """
    frames, size = generator.bundle.manifest.frames, generator.bundle.manifest.size
    first = case = open_case(seeds[0], frames, size)
    for i, seed in enumerate(seeds):
        last = i + 1 == len(seeds)
        other = first if last else open_case(seeds[i + 1], frames, size)
        clips: dict[str, NDArray[np.uint8]] = {
            "source": case.source.frames,
            "twin": case.twin.frames,
        }
        for name in sets:
            given = _given(name, case, other)
            clips[name] = generator(given, steps=steps, guidance=guidance, seed=seed).frames
        for name, clip in clips.items():
            figures = measure(case, other, clip, judge(clip))
            yield {"seed": seed, "set": name} | figures
        case = other


def _given(name: str, case: Case, other: Case) -> Conditions:
    if name == SWAPPED:
        return replace(case.conditions, mask=other.labels)
    return case.conditions.only(SETS[name])


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Figures per condition set, means over clips, relative ones as the targets are stated.

    ssim_share: SSIM over the twins' SSIM. excess: `dice_other` less `overlap`; > 0.05 would mean
    that any heart scores. ef_r: EF measured against EF asked by the masks. spectrum_gap: largest
    difference from the source over bands, dB, of mean spectra; spectrum_gap_clip: the same for the
    median clip alone. speckle_gap: relative deviation of mean/std, mean over clips. travel_share,
    flicker_share: over the source's.
    """
    by_set: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_set.setdefault(row["set"], []).append(row)
    source, twin = by_set["source"], by_set["twin"]
    return {name: _summary(clips, source, twin) for name, clips in by_set.items()}


def _summary(
    clips: list[dict[str, Any]], source: list[dict[str, Any]], twin: list[dict[str, Any]]
) -> dict[str, float]:
    def column(rows: list[dict[str, Any]], key: str) -> NDArray[np.float64]:
        return np.array([row[key] for row in rows], float)

    def mean(rows: list[dict[str, Any]], key: str) -> float:
        return _mean(column(rows, key))

    gap = column(clips, "spectrum_db") - column(source, "spectrum_db")
    gap = gap[np.isfinite(gap).all(1)]
    grain = column(clips, "speckle_ratio") / column(source, "speckle_ratio")
    return {
        "clips": len(clips),
        "ssim": mean(clips, "ssim"),
        "ssim_share": mean(clips, "ssim") / mean(twin, "ssim"),
        "dice": mean(clips, "dice"),
        "dice_other": mean(clips, "dice_other"),
        "excess": mean(clips, "dice_other") - mean(clips, "overlap"),
        "ef_r": metrics.pearson(column(clips, "ef"), column(clips, "ef_asked")),
        "ef_error": _mean(np.abs(column(clips, "ef") - column(clips, "ef_asked"))),
        "spectrum_gap": float(np.abs(gap.mean(0)).max()) if len(gap) else float("nan"),
        "spectrum_gap_clip": float(np.median(np.abs(gap).max(1))) if len(gap) else float("nan"),
        "speckle_ratio": mean(clips, "speckle_ratio"),
        "speckle_gap": _mean(np.abs(grain - 1)),
        "travel": mean(clips, "travel"),
        "travel_share": mean(clips, "travel") / mean(source, "travel"),
        "flicker": mean(clips, "flicker"),
        "flicker_share": mean(clips, "flicker") / mean(source, "flicker"),
        "flow_error": mean(clips, "flow_error"),
    }


def _mean(values: NDArray[np.float64]) -> float:
    """Mean of what is finite; NaN where nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")


@dataclass(frozen=True)
class Target:
    """One promise: a figure of the "all" set and the bound it must keep."""

    what: str
    figure: str
    bound: float
    at_least: bool

    def kept(self, figures: Mapping[str, float]) -> bool:
        """Whether the figure keeps the bound; NaN does not."""
        value = figures[self.figure]
        return value >= self.bound if self.at_least else value <= self.bound


TARGETS = (
    Target("SSIM with the source, share of the ceiling", "ssim_share", 0.95, True),
    Target("LV Dice with the masks asked for", "dice", 0.85, True),
    Target("Dice with another heart's masks, above their own overlap", "excess", 0.05, False),
    Target("EF measured against EF asked by masks, r", "ef_r", 0.9, True),
    Target("power spectrum in tissue, largest gap to the source (dB)", "spectrum_gap", 1.5, False),
    Target("speckle mean/std, relative gap to the source", "speckle_gap", 0.15, False),
    Target("speckle correlation along the flow, share of the source's", "travel_share", 0.8, True),
    Target("flicker in still tissue, share of the source's", "flicker_share", 1.5, False),
)
