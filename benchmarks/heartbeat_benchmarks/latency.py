"""What each condition set costs here, stage by stage, warm and cold, with the raw samples.

Clips of all rows take turns, so that a drifting machine wrongs none of them; hearts and noise seeds
change with every clip, so that nothing can be remembered. Times are milliseconds of wall clock.
"""

import gc
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from heartbeat_benchmarks import cold_start, first_frame, flops, probe, results, sets, validity
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_benchmarks.gate import REFERENCE, Gate
from heartbeat_benchmarks.timing import needed, summary
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.controls import Settings
from heartbeat_fast.generator import STAGES, Generator
from heartbeat_training.evaluate import ALL, LADDER
from heartbeat_training.phantom import record

FIRST_SEED, HEARTS = 950_000, 4
WARM_UP = 2  # clips of each row: sessions are made in the first, buffers have settled by the second
BATCH_RUNS = needed(0.5)
TOTAL, OTHER = "total", "other"


@dataclass(frozen=True)
class Workload:
    """What is timed: every engine at every step count under every set (names of sets.py).

    batches: clips asked for at once, of the last set. Graphs hold one clip, so they are made one
    after the other. cold_starts: fresh processes an engine, with the last set's conditions.
    """

    engines: tuple[str, ...] = ("auto",)
    sets: tuple[str, ...] = (*LADDER, ALL)
    steps: tuple[int, ...] = (10,)
    runs: int = needed(0.9)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    guidance: float = 1.0
    sampler: str | None = None  # the one that suits the bundle
    cold_starts: int = 5
    probe_sides: tuple[int, ...] = probe.SIDES


@dataclass(frozen=True)
class Row:
    """One line of the table: a warm generator, a condition set, a step count."""

    generator: Generator
    asked: str  # the engine as asked for
    set: str
    steps: int

    def head(self) -> dict[str, Any]:
        """What identifies the row in a result."""
        engine = self.generator.engine
        return {
            "asked": self.asked,
            "engine": engine.name,
            "precision": engine.precision,
            "device": engine.device,
            "set": self.set,
            "conditions": sets.conditions_of(self.set),
            "steps": self.steps,
        }


def run(bundle: str | Path | None, work: Workload) -> dict[str, Any]:
    """Time a workload. Returns the result that `results.save` stores.

    Raises: BundleError, EngineError, SamplerError as the generator does.
    """
    generators = {name: Generator.open(bundle, name) for name in work.engines}
    opened = next(iter(generators.values())).bundle
    manifest = opened.manifest
    hearts = [
        record(seed, frames=manifest.frames, size=manifest.size).conditions()
        for seed in range(FIRST_SEED, FIRST_SEED + HEARTS)
    ]
    rows = [
        Row(generators[name], name, one, steps)
        for name in work.engines
        for steps in work.steps
        for one in work.sets
    ]
    printed = fingerprint(opened)
    peaks, watch = [probe.measure(work.probe_sides)], validity.Watch()
    with Progress(transient=True) as progress:
        timed = _warm(rows, hearts, work, progress)
        batches = list(_batches(generators, hearts, work, progress))
        first = list(_first(generators, hearts, work))
        cold = list(_cold(opened, hearts[0], work, progress))
    used = watch.read()
    peaks.append(probe.measure(work.probe_sides))
    _judge(timed, rows, hearts[0], work, peaks[0])
    found = validity.verdict(peaks[0], peaks[1], used)
    few = validity.too_few(work.runs, needed(0.9))
    workload = asdict(work) | {"frames": manifest.frames, "size": manifest.size}
    return {
        "fingerprint": printed,
        "workload": workload | {"hearts": [FIRST_SEED, FIRST_SEED + HEARTS]},
        "method": method(),
        "peaks": {"before": peaks[0], "after": peaks[1]},
        "rows": timed,
        "batches": batches,
        "first_frame": first,
        "cold": cold,
        "quality": _quality(manifest.fingerprints.get("weights", "")),
        "used": used,
        "verdict": {"valid": found["valid"] and not few, "reasons": found["reasons"] + few},
    }


def method() -> dict[str, Any]:
    """How it was measured, as the report contract wants it said."""
    return {
        "process": "one for all warm rows, a fresh one for every cold start; disk cache warm",
        "warm_up": WARM_UP,
        "order": "rows take turns, clip by clip",
        "timer": "time.perf_counter around the whole call; stages inside it",
        "inputs": "numpy arrays in main memory",
        "garbage_collection": "on" if gc.isenabled() else "off",
    }


def _warm(
    rows: Sequence[Row], hearts: Sequence[Conditions], work: Workload, progress: Progress
) -> list[dict[str, Any]]:
    """Every row's head and stages: {stage: summary with samples}, with "other" and "total"."""
    samples: list[dict[str, list[float]]] = [
        {stage: [] for stage in (*STAGES, OTHER, TOTAL)} for _ in rows
    ]
    clips: list[set[str]] = [set() for _ in rows]
    task = progress.add_task("clips", total=len(rows) * (WARM_UP + work.runs))
    for i in range(-WARM_UP, work.runs):
        for row, into, seen in zip(rows, samples, clips, strict=True):
            given = hearts[i % len(hearts)].only(sets.conditions_of(row.set))
            times, digest = time_clip(row.generator, given, row.steps, i + WARM_UP, work)
            progress.advance(task)
            if i < 0:
                continue
            seen.add(digest)
            for stage, milliseconds in times.items():
                into[stage].append(milliseconds)
    return [
        row.head()
        | {"distinct_clips": len(seen), "stages": {k: _described(t) for k, t in into.items()}}
        for row, into, seen in zip(rows, samples, clips, strict=True)
    ]


def time_clip(
    generator: Generator, given: Conditions, steps: int, seed: int, work: Workload
) -> tuple[dict[str, float], str]:
    """Milliseconds of one clip by stage, and a digest of its frames (not timed)."""
    start = time.perf_counter()
    clip = generator(given, steps=steps, guidance=work.guidance, seed=seed, sampler=work.sampler)
    total = (time.perf_counter() - start) * 1e3
    stages: dict[str, float] = clip.provenance["timings_ms"]
    other = total - sum(stages.values())
    return stages | {OTHER: other, TOTAL: total}, hashlib.sha256(clip.frames.tobytes()).hexdigest()


def _batches(
    generators: dict[str, Generator],
    hearts: Sequence[Conditions],
    work: Workload,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Several clips asked for at once: one sample is the whole batch."""
    steps, name = work.steps[0], work.sets[-1]
    task = progress.add_task("batches", total=len(generators) * len(work.batches) * BATCH_RUNS)
    for asked, generator in generators.items():
        for batch in work.batches:
            samples = []
            for i in range(BATCH_RUNS):
                given = [
                    hearts[(i + j) % len(hearts)].only(sets.conditions_of(name))
                    for j in range(batch)
                ]
                start = time.perf_counter()
                for j, one in enumerate(given):
                    time_clip(generator, one, steps, 1000 + i * batch + j, work)
                samples.append((time.perf_counter() - start) * 1e3)
                progress.advance(task)
            head = Row(generator, asked, name, steps).head()
            how = "one after the other: the graphs hold one clip"
            yield head | {"batch": batch, "how": how, TOTAL: _described(samples)}


def _first(
    generators: dict[str, Generator], hearts: Sequence[Conditions], work: Workload
) -> Iterator[dict[str, Any]]:
    """Time to the first frame after a change, condition by condition, of the last set."""
    given = [heart.only(sets.conditions_of(work.sets[-1])) for heart in hearts[:2]]
    settings = Settings(steps=work.steps[0], sampler=work.sampler, guidance=work.guidance)
    for asked, generator in generators.items():
        for row in first_frame.measure(generator, given, settings, BATCH_RUNS):
            yield {"asked": asked, "steps": work.steps[0], **row}


def _cold(
    bundle: Bundle, heart: Conditions, work: Workload, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Fresh processes, one after the other, with the last set's conditions."""
    given = heart.only(sets.conditions_of(work.sets[-1]))
    task = progress.add_task("cold starts", total=len(work.engines) * work.cold_starts)
    for engine in work.engines if work.cold_starts else ():
        starts = []
        for _ in range(work.cold_starts):
            start = cold_start.measure(bundle.path, engine, work.steps[0], work.sampler, given)
            starts.append(start)
            progress.advance(task)
        stages = {key: _described([start[key] for start in starts]) for key in starts[0]}
        memory = stages.pop(cold_start.MEMORY)["max"]
        head = {"asked": engine, "set": work.sets[-1], "steps": work.steps[0]}
        yield head | {"peak_memory_mb": memory, "stages": stages}


def _judge(
    timed: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    heart: Conditions,
    work: Workload,
    peaks: dict[str, dict[str, Any]],
) -> None:
    """Adds to every row its FLOP, its shares of the peak, and the gate's verdict."""
    bundle = rows[0].generator.bundle
    graphs = flops.bundle_flop(bundle)
    reference = next((row.generator for row in rows if row.asked == REFERENCE), None)
    gate = Gate(reference or Generator.open(bundle, REFERENCE), work.guidance, work.sampler)
    for result, row in zip(timed, rows, strict=True):
        given = heart.only(result["conditions"])
        result["gate"] = gate.verdict(row.generator, given, row.steps)
        peak = result["peak_gflops"] = probe.peak_of(peaks, result["precision"])
        if not graphs:
            continue
        result["flop"] = flops.clip_flop(graphs, given.present, row.steps, work.guidance)
        loop = graphs["denoise"] * row.steps * (1 if work.guidance == 1 else 2)
        for share, stage, flop in (
            ("share_of_peak", TOTAL, result["flop"]),
            ("denoise_share_of_peak", "denoise", loop),
        ):
            if peak and (p50 := result["stages"][stage].get("p50")):
                result[share] = round(flop / (p50 * 1e6) / peak, 4)


def _described(times: list[float]) -> dict[str, Any]:
    return summary(times) | {"samples": [round(t, 3) for t in times]}


def _quality(weights: str) -> dict[str, Any] | None:
    """The figures of the newest quality run of the same weights: no speed without them."""
    path = results.newest("quality", weights=weights)
    if path is None:
        return None
    return {"file": path.name, **results.load(path)["summary"].get(ALL, {})}
