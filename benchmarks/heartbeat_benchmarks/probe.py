"""Matrix products at full speed: the scale that a latency is read against, fp32 and bf16.

Measured in a process of its own, so that the process being timed stays free of torch. The peak is
the best of several sizes and libraries (numpy's BLAS, torch's), since no one of them is the fastest
everywhere; a convolution may still exceed it: it is a scale, not a ceiling.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from heartbeat_fast.errors import HeartBeatError

SIDES = (1024, 2048)
REPEATS = 6  # the first one warms up; the best counts
DTYPES = ("fp32", "bf16")


def measure(sides: Sequence[int] = SIDES) -> dict[str, dict[str, Any]]:
    """{"fp32": {"gflops", "by"}, "bf16": …} of this machine now; bf16 only where torch is there.

    Raises:
        HeartBeatError: the process did not end well.
    """
    command = [sys.executable, "-m", "heartbeat_benchmarks.probe", *map(str, sides)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise HeartBeatError(f"matrix probe: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def peak_of(peaks: dict[str, dict[str, Any]], precision: str) -> float | None:
    """GFLOP/s that a precision is held to: bf16's for anything below fp32, None if not probed.

    There is no probe of int8: its share may exceed 1.
    """
    found = peaks.get("fp32" if precision in ("", "fp32") else "bf16")
    return float(found["gflops"]) if found else None


def best_gflops(product: Callable[[], object], side: int) -> float:
    """Of a product of two square matrices."""
    best = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e9


def main(arguments: Sequence[str]) -> int:
    """Probes and prints one line of JSON."""
    found: dict[str, dict[str, Any]] = {}

    def note(dtype: str, gflops: float, by: str) -> None:
        if gflops > found.get(dtype, {"gflops": 0.0})["gflops"]:
            found[dtype] = {"gflops": round(gflops, 1), "by": by}

    rng = np.random.Generator(np.random.PCG64(0))
    try:
        import torch
    except ImportError:
        torch = None  # type: ignore[assignment]
    for side in map(int, arguments):
        a, b = rng.standard_normal((2, side, side), np.float32)
        note("fp32", best_gflops(lambda a=a, b=b: a @ b, side), f"numpy {side}")  # type: ignore[misc]
        if torch is None:
            continue
        for dtype, kind in zip(DTYPES, (torch.float32, torch.bfloat16), strict=True):
            x, y = (torch.from_numpy(m).to(kind) for m in (a, b))
            gflops = best_gflops(lambda x=x, y=y: x @ y, side)  # type: ignore[misc]
            note(dtype, gflops, f"torch {side}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
