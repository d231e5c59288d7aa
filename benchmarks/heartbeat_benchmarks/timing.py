"""Samples of a time, and what may be said about them."""

import math
import time
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


def gemm_gflops(side: int = 1024, repeats: int = 5) -> float:
    """fp32 matrix product of this machine now, best of some, in GFLOP/s: the scale for a latency.

    Taken before and after a benchmark it also shows whether the machine kept its speed.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    a, b = rng.standard_normal((2, side, side), np.float32)
    best = math.inf
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9
