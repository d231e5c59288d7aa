"""Two runs of one machine, row by row: the ratio of their times, with an interval.

Rows meet by engine, precision, condition set and step count. The interval is a percentile bootstrap
(Efron, Ann. Statist. 7(1), 1979) of the ratio B / A of medians, and of p90 where both samples carry
one: each resample draws both runs anew. What was measured on different machines is refused.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from heartbeat_benchmarks import results
from heartbeat_benchmarks.timing import supported
from heartbeat_fast.errors import HeartBeatError

RESAMPLES, LEVEL = 4000, 0.95
MACHINE = ("cpu", "flags", "cores", "memory_gb", "omp_num_threads", "gpu")
WORK = ("frames", "size", "guidance", "sampler")
HEAD = ("engine", "precision", "set", "name", "steps", "sampler")  # what makes two rows one


def compare(a: dict[str, Any], b: dict[str, Any], force: bool = False) -> list[dict[str, Any]]:
    """A row for each that both runs have: {"row", "median", "p90"}, each ratio with its interval.

    p90 is None where a sample is too small. `says` is "faster", "slower" or "no difference seen".

    Raises:
        HeartBeatError: other machines (unless forced), other work, or no row in common.
    """
    if a["kind"] != b["kind"]:
        raise HeartBeatError(
            f"compare: a {a['kind']} and a {b['kind']} result came; wanted one kind"
        )
    machines = [result["fingerprint"]["machine"] for result in (a, b)]
    if (odd := differing(machines[0], machines[1], MACHINE)) and not force:
        raise HeartBeatError(
            f"compare: different machines ({odd}): measure both on one, or use --force"
        )
    if odd := differing(a["workload"], b["workload"], WORK):
        raise HeartBeatError(f"compare: different work ({odd}): run the same command twice")
    mine, theirs = (_samples(result) for result in (a, b))
    if not (both := [key for key in mine if key in theirs]):
        raise HeartBeatError("compare: no row in common: run the same command twice")
    return [_row(key, mine[key], theirs[key]) for key in both]


def differing(one: dict[str, Any], other: dict[str, Any], keys: Sequence[str]) -> str:
    """ "cores: 2 and 8" for every key whose values differ; "" where none does."""
    pairs = ((key, one.get(key), other.get(key)) for key in keys)
    return ", ".join(f"{key}: {x} and {y}" for key, x, y in pairs if x != y)


def ratio(
    a: Sequence[float], b: Sequence[float], quantile: float, resamples: int = RESAMPLES
) -> dict[str, float]:
    """{"ratio", "low", "high"} of a quantile of b over that of a."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    rng = np.random.Generator(np.random.PCG64(0))
    drawn = [rng.choice(values, (resamples, len(values))) for values in (x, y)]
    below, above = (np.quantile(values, quantile, axis=1) for values in drawn)
    ratios = above / below
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return {
        "ratio": float(np.quantile(y, quantile) / np.quantile(x, quantile)),
        "low": float(low),
        "high": float(high),
    }


def says(found: dict[str, float]) -> str:
    """What an interval lets one say of B."""
    if found["high"] < 1:
        return "faster"
    return "slower" if found["low"] > 1 else "no difference seen"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as a table."""
    cells = [[row["row"], _shown(row["median"]), _shown(row["p90"]), row["says"]] for row in rows]
    return results.markdown(["row", "median, B / A", "p90, B / A", "B is"], cells)


def _row(key: tuple[str, ...], a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    median = ratio(a, b, 0.5)
    carried = supported(0.9, min(len(a), len(b)))
    return {
        "row": ", ".join(part for part in key if part),
        "n": (len(a), len(b)),
        "median": median,
        "p90": ratio(a, b, 0.9) if carried else None,
        "says": says(median),
    }


def _samples(result: dict[str, Any]) -> dict[tuple[str, ...], list[float]]:
    """Total times by what names a row."""
    found = {}
    for row in result.get("rows", []):
        total = row.get("stages", {}).get("total")
        if total is None:
            raise HeartBeatError(f"compare: a {result['kind']} result has no timed rows")
        found[tuple(str(row.get(key, "")) for key in HEAD)] = total["samples"]
    return found


def _shown(found: dict[str, float] | None) -> str:
    return (
        "–" if found is None else f"{found['ratio']:.3f} ({found['low']:.3f}–{found['high']:.3f})"
    )
