"""What each condition set costs here, stage by stage, warm and cold, with the raw samples.

Clips of all sets take turns, so that a drifting machine wrongs none of them; hearts and noise seeds
change with every clip, so that nothing can be remembered. Times are milliseconds of wall clock.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from heartbeat_benchmarks import results
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_benchmarks.timing import gemm_gflops, needed, summary
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.generator import STAGES, Generator
from heartbeat_training.evaluate import ALL, LADDER, SETS
from heartbeat_training.phantom import record

FIRST_SEED, HEARTS = 950_000, 4
ENCODE = ("text", "image", "local", "context")  # stages before the loop
WARM_UP = 2  # clips of each set: sessions are made in the first, buffers have settled by the second
DRIFT, LOAD = 0.1, 0.5  # of matrix speed over the run; of load per core before it


@dataclass(frozen=True)
class Workload:
    """What is timed. Batch is 1; `sets` are names of evaluate.SETS."""

    engine: str = "auto"
    sets: tuple[str, ...] = (*LADDER, ALL)
    runs: int = needed(0.9)
    steps: int = 10
    guidance: float = 1.0
    sampler: str = "dpmpp_2m"
    cold_starts: int = 5


def run(bundle: str | Path | None, work: Workload) -> dict[str, Any]:
    """Time a workload. Returns the result that `results.save` stores.

    Raises: BundleError, EngineError, SamplerError as the generator does.
    """
    generator = Generator.open(bundle, work.engine)
    manifest = generator.bundle.manifest
    hearts = [
        record(seed, frames=manifest.frames, size=manifest.size).conditions()
        for seed in range(FIRST_SEED, FIRST_SEED + HEARTS)
    ]
    printed = fingerprint(generator.bundle)
    gemm = [gemm_gflops()]
    warm = _warm(generator, work, hearts)
    gemm.append(gemm_gflops())
    cold = _cold(generator.bundle.path, work, hearts[0])
    return {
        "fingerprint": printed,
        "workload": asdict(work)
        | {"frames": manifest.frames, "size": manifest.size, "batch": 1, "warm_up": WARM_UP},
        "engine": {
            "name": generator.engine.name,
            "precision": generator.engine.precision,
            "device": generator.engine.device,
        },
        "gemm_fp32_gflops": {"before": gemm[0], "after": gemm[1]},
        "peak_memory_mb": _peak_memory_mb(),
        "warm_ms": warm,
        "cold_ms": cold,
        "quality": _quality(manifest.fingerprints.get("weights", "")),
        "doubts": _doubts(printed["machine"], gemm),
    }


def _warm(generator: Generator, work: Workload, hearts: Sequence[Conditions]) -> dict[str, Any]:
    """{set: {stage: summary with samples}}; stages are the generator's, "other" and "total"."""
    samples: dict[str, dict[str, list[float]]] = {
        name: {stage: [] for stage in (*STAGES, "other", "total")} for name in work.sets
    }
    for i in track(range(-WARM_UP, work.runs), description="clips", transient=True):
        for name in work.sets:
            given = hearts[i % len(hearts)].only(SETS[name])
            start = time.perf_counter()
            clip = generator(
                given,
                steps=work.steps,
                guidance=work.guidance,
                seed=i + WARM_UP,
                sampler=work.sampler,
            )
            total = (time.perf_counter() - start) * 1e3
            if i < 0:
                continue
            stages = clip.provenance["timings_ms"]
            for stage in STAGES:
                samples[name][stage].append(stages[stage])
            samples[name]["other"].append(total - sum(stages.values()))
            samples[name]["total"].append(total)
    return {
        name: {stage: _described(times) for stage, times in stages.items()}
        for name, stages in samples.items()
    }


def _described(times: list[float]) -> dict[str, Any]:
    return summary(times) | {"samples": [round(t, 3) for t in times]}


def _cold(bundle: Path, work: Workload, conditions: Conditions) -> dict[str, Any]:
    """Fresh processes, one after the other; the last set's conditions. The disk's cache is warm."""
    given = conditions.only(SETS[work.sets[-1]])
    arrays = {name: np.asarray(getattr(given, name)) for name in given.present}
    marks: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "conditions.npz"
        np.savez(file, allow_pickle=False, frames=given.frames, size=given.size, **arrays)
        for _ in track(range(work.cold_starts), description="cold starts", transient=True):
            options = [str(bundle), work.engine, str(work.steps), str(file), repr(time.time())]
            command = [sys.executable, "-m", "heartbeat_benchmarks.cold_start", *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise HeartBeatError(f"cold start: {done.stderr.strip().splitlines()[-1]}")
            for stage, milliseconds in json.loads(done.stdout).items():
                marks[stage].append(milliseconds)
    return {stage: _described(times) for stage, times in marks.items()}


def _quality(weights: str) -> dict[str, Any] | None:
    """The figures of the newest quality run of the same weights: no speed without them."""
    path = results.newest("quality", weights=weights)
    if path is None:
        return None
    return {"file": path.name, **results.load(path)["summary"].get(ALL, {})}


def _doubts(machine: dict[str, Any], gemm: Sequence[float]) -> list[str]:
    """Reasons not to trust the figures; empty when the machine was quiet and steady."""
    doubts = []
    if (load := machine["load_1min"] or 0.0) > LOAD * machine["cores"]:
        doubts.append(
            f"the machine was busy: load {load} on {machine['cores']} cores before the run"
        )
    if abs(gemm[1] / gemm[0] - 1) > DRIFT:
        doubts.append(f"matrix speed drifted from {gemm[0]:.0f} to {gemm[1]:.0f} GFLOP/s")
    return doubts


def _peak_memory_mb() -> float | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    # kilobytes on Linux, bytes on macOS
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def table(result: dict[str, Any]) -> Table:
    """Stages of every set as p50 / p90 in milliseconds; a dash where the sample supports none."""
    engine, machine = result["engine"], result["fingerprint"]["machine"]
    name, runs = result["fingerprint"]["bundle"]["name"], result["workload"]["runs"]
    shown = Table(
        title=f"{name}, {engine['name']} {engine['precision']} on {machine['cores']} cores of "
        f"{machine['cpu']}: ms, p50 / p90 of {runs} clips"
    )
    shown.add_column("stage")
    sets = result["warm_ms"]
    for name in sets:
        shown.add_column(name, justify="right")
    for stage in (*STAGES, "other", "total"):
        cells = [_pair(sets[name][stage]) for name in sets]
        shown.add_row(stage, *cells, style="bold" if stage == "total" else None)
    return shown


def _pair(described: dict[str, Any]) -> str:
    return " / ".join(
        f"{described[key]:.1f}" if key in described else "–" for key in ("p50", "p90")
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What belongs beside the table: machine speed, cold start, quality, doubts."""
    gemm, cold = result["gemm_fp32_gflops"], result["cold_ms"]
    lines = [
        f"fp32 matrix products: {gemm['before']:.0f} GFLOP/s before, {gemm['after']:.0f} after"
    ]
    if cold:
        times = ", ".join(f"{stage} {np.median(s['samples']):.0f}" for stage, s in cold.items())
        lines.append(f"cold start, median ms of {next(iter(cold.values()))['n']}: {times}")
    quality = result["quality"]
    if quality:
        lines.append(f"quality of these weights: {quality['file']}")
    else:
        lines.append("quality of these weights: not measured; run `heartbeat-bench quality`")
    return lines + [f"doubtful: {doubt}" for doubt in result["doubts"]]


def markdown(result: dict[str, Any]) -> str:
    """The table for documents: one row per condition set, p50 / p90 in ms, and what it ran on."""
    work, machine, engine = result["workload"], result["fingerprint"]["machine"], result["engine"]
    head = ["conditions", "encode", f"denoise × {work['steps']}", "decode", "clip", "frames/s"]
    rows = []
    for name, stages in result["warm_ms"].items():
        encode = sum(stages[s].get("p50", np.nan) for s in ENCODE)
        rate = 1e3 * work["frames"] / stages["total"].get("p50", np.nan)
        cells = [_pair(stages[stage]) for stage in ("denoise", "decode", "total")]
        rows.append([name, results.number(encode, 1), *cells, results.number(rate, 1)])
    about = (
        f"ms, p50 / p90 over {work['runs']} clips of {work['frames']} frames {work['size']}×"
        f"{work['size']}; {engine['name']} {engine['precision']}, {machine['cores']} cores of "
        f"{machine['cpu']}"
    )
    return results.markdown(head, rows) + "\n\n" + "; ".join([about, *notes(result)]) + "."
