"""Samples of a time, and what may be said about them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.99


def supported(quantile: float, samples: int) -> bool:
    """Whether n samples bound a quantile from above at 99 %, whatever their distribution.

    The largest of n exceeds the q-quantile with probability 1 − qⁿ: p50 needs 7 samples, p90 44,
    p95 90, p99 459 (Wilks, Ann. Math. Stat. 12(1), 1941).
    """
    return 1 - quantile**samples >= CONFIDENCE


def needed(quantile: float) -> int:
    """Fewest samples that support a quantile."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(quantile))


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """n, min, max and those of p50, p90, p95, p99 that the sample supports, in its own unit."""
    values = np.asarray(samples, float)
    found: dict[str, Any] = {"n": len(values)}
    if not len(values):
        return found
    found |= {"min": float(values.min()), "max": float(values.max())}
    for percent in (50, 90, 95, 99):
        if supported(percent / 100, len(values)):
            found[f"p{percent}"] = float(np.percentile(values, percent))
    return found
