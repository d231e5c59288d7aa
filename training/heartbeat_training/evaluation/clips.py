"""Figures of one generated clip: likeness to its source, obedience to its conditions, texture.

Every clip has its real clip beside it, measured alike: where a figure has no natural zero, the
share of the real clip's figure is what counts. Legend: F frames, H W pixels, S sets of conditions.
"""

from itertools import combinations
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from heartbeat_training import metrics
from heartbeat_training.evaluate import Judge
from heartbeat_training.evaluation.cases import Case
from heartbeat_training.evaluation.distances import mean_interval
from heartbeat_training.evaluation.lpips import Lpips

Frames = NDArray[np.uint8]
REAL = "real"  # the set of the sources themselves: the judge's ceiling and texture's yardstick
NONE = float("nan")

# figure: its title in tables; docs/evaluate.md says what each means.
FIGURES = {
    "ssim": "SSIM with the source",
    "lpips": "LPIPS to the source",
    "dice_lv": "Dice, left ventricle",
    "dice_myocardium": "Dice, myocardium",
    "dice_la": "Dice, left atrium",
    "ef_error": "EF error (points)",
    "flow_error": "flow error (pixels)",
    "flicker_share": "flicker / real's",
    "spectrum_gap": "spectrum gap (dB)",
    "speckle_share": "speckle mean/std / real's",
    "travel_share": "speckle travel / real's",
}


def figures(
    case: Case,
    frames: Frames,
    judge: Judge | None = None,
    lpips: Lpips | None = None,
    real: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All figures of a clip (F, H, W) made for a case; NaN where something is lacking.

    real: the figures of case.frames themselves; None when these are being measured.
    """
    found: dict[str, Any] = {
        "ssim": metrics.ssim(frames, case.frames),
        "lpips": lpips(frames, case.frames) if lpips else NONE,
        **_anatomy(case, frames, judge),
        "flow_error": metrics.flow_error(frames, case.flow, case.tissue),
        "flicker": metrics.flicker(frames, case.flow, case.tissue),
    }
    # a clip from text alone may be black where the source has tissue: no speckle, no figure
    with np.errstate(divide="ignore", invalid="ignore"):
        found |= {
            "spectrum_db": metrics.power_spectrum(frames, case.tissue).tolist(),
            "speckle_ratio": metrics.speckle_ratio(frames, case.tissue, case.dynamic_range),
            "travel": metrics.speckle_correlation(frames, case.flow, case.tissue),
        }
        yardstick = real or found
        gap = np.subtract(found["spectrum_db"], yardstick["spectrum_db"])
    return found | {
        "spectrum_gap": float(np.abs(gap).mean()),
        "spectrum_gaps": gap.tolist(),
        "flicker_share": _share(found["flicker"], yardstick["flicker"]),
        "speckle_share": _share(found["speckle_ratio"], yardstick["speckle_ratio"]),
        "travel_share": _share(found["travel"], yardstick["travel"]),
    }


def _anatomy(case: Case, frames: Frames, judge: Judge | None) -> dict[str, float]:
    """Dice and EF of what the judge sees against the masks asked for."""
    labels = case.record.labels
    names = ("dice_lv", "dice_myocardium", "dice_la", "ef", "ef_asked", "ef_error")
    if judge is None or labels is None:
        return dict.fromkeys(names, NONE)
    seen = judge(frames)
    ef, asked = metrics.ef_area_length(seen), metrics.ef_area_length(labels)
    structures = (metrics.LV, metrics.MYOCARDIUM, metrics.LA)
    dices = [metrics.dice(seen, labels, structure) for structure in structures]
    return dict(zip(names, [*dices, ef, asked, abs(ef - asked)], strict=True))


def _share(value: float, of: float) -> float:
    return value / of if of else NONE


def diversity(clips: list[Frames]) -> float:
    """Mean distance between clips of the same conditions and different seeds, grey levels.

    RMS of low-passed frames (σ = 4 pixels of 256 rows): another anatomy counts, another speckle
    does not. NaN for fewer than two clips.
    """
    if len(clips) < 2:
        return NONE
    sigma = 4 * clips[0].shape[1] / 256
    smooth = [
        np.stack([cv2.GaussianBlur(f.astype(np.float32), (0, 0), sigma) for f in clip])
        for clip in clips
    ]
    return float(np.mean([np.sqrt(((a - b) ** 2).mean()) for a, b in combinations(smooth, 2)]))


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each figure's mean over clips with its 95 % interval over patients, and EF's bias and r.

    rows: of one set, with "patient". Returns {figure: {"mean", "low", "high", "n"}}.
    spectrum_worst: the band whose gap, mean over clips, is largest: clips' own noise evens out.
    """
    patients = np.array([row["patient"] for row in rows])
    out = {}
    for name in (*FIGURES, "diversity", "seconds"):
        values = np.array([row.get(name, NONE) for row in rows], float)
        mean, low, high = mean_interval(values, patients)
        n = int(np.isfinite(values).sum())
        out[name] = {"mean": mean, "low": low, "high": high, "n": n}
    seen, asked = (np.array([row[key] for row in rows], float) for key in ("ef", "ef_asked"))
    mean, low, high = mean_interval(seen - asked, patients)
    out["ef_bias"] = {"mean": mean, "low": low, "high": high}
    out["ef_r"] = {"mean": metrics.pearson(seen, asked)}
    every = np.array([row.get("spectrum_gaps", [NONE]) for row in rows], float)
    gaps = every[np.isfinite(every).all(1)]
    worst = float(np.abs(gaps.mean(0)).max()) if len(gaps) else NONE
    out["spectrum_worst"] = {"mean": worst, "n": len(gaps)}
    return out
