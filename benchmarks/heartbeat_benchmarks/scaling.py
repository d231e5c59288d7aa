"""How cost grows with steps, clips, frames and resolution, against what the operations say.

Steps and clips are varied on the bundle itself. Frames and resolution are fixed in a bundle's
graphs, so those are exported anew at every size, with random weights: time does not depend on them.
All sizes of one axis take turns. Times are milliseconds of wall clock a clip, all conditions.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from heartbeat_benchmarks import flops, probe, validity
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_benchmarks.timing import needed, summary
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.generator import Generator
from heartbeat_training.phantom import record

SEED = 960_000
STRAIGHT = 0.99  # r² of cost against steps that is wanted


@dataclass(frozen=True)
class Plan:
    """Values of every axis; an empty one is left out. `at` holds for the axes that do not vary."""

    engine: str = "auto"
    steps: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 15, 20)
    batches: tuple[int, ...] = (1, 2, 4, 8)
    frames: tuple[int, ...] = (8, 16, 24, 32)
    sizes: tuple[int, ...] = (128, 192, 256, 320)
    at: int = 4
    sampler: str = "dpmpp_2m"
    runs: int = needed(0.5)
    probe_sides: tuple[int, ...] = probe.SIDES


@dataclass(frozen=True)
class Point:
    """One value of an axis: the generator, the steps, the clips asked for at once."""

    value: int
    generator: Generator
    given: Conditions
    steps: int
    clips: int = 1


def run(bundle: str | Path | None, plan: Plan) -> dict[str, Any]:
    """Measure every axis. Returns the result that `results.save` stores.

    Raises: BundleError, EngineError, ExportError, SamplerError.
    """
    generator = Generator.open(bundle, plan.engine)
    printed = fingerprint(generator.bundle)
    peaks, watch = [probe.measure(plan.probe_sides)], validity.Watch()
    axes: dict[str, Any] = {}
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        for name in ("steps", "batches", "frames", "sizes"):
            if getattr(plan, name):
                found = points(name, plan, generator, Path(folder))
                axes[name] = _axis(found, plan, progress, name)
    used = watch.read()
    peaks.append(probe.measure(plan.probe_sides))
    engine = generator.engine
    return {
        "fingerprint": printed,
        "workload": asdict(plan) | {"conditions": "all"},
        "engine": {"name": engine.name, "precision": engine.precision, "device": engine.device},
        "peaks": {"before": peaks[0], "after": peaks[1]},
        "axes": axes,
        "used": used,
        "verdict": validity.verdict(peaks[0], peaks[1], used),
    }


def points(axis: str, plan: Plan, generator: Generator, folder: Path) -> list[Point]:
    """The points of one axis; bundles made for them lie in `folder`."""
    values: tuple[int, ...] = getattr(plan, axis)
    given = _given(generator.bundle)
    if axis == "steps":
        tables = generator.bundle.samplers()
        known = [value for value in values if (plan.sampler, value) in tables]
        return [Point(value, generator, given, value) for value in known]
    if axis == "batches":
        return [Point(value, generator, given, plan.at, value) for value in values]
    made = []
    for value in values:
        bundle = at_size(generator.bundle, folder / f"{axis}-{value}", axis, value)
        opened = Generator.open(bundle, plan.engine)
        made.append(Point(value, opened, _given(bundle), plan.at))
    return made


def at_size(bundle: Bundle, folder: Path, axis: str, value: int) -> Bundle:
    """A bundle of the same architecture for `value` frames, or for `value` × `value` pixels, with
    random weights.

    Raises:
        ConfigError, ExportError: no such model can be built.
    """
    import torch  # only these two axes need the exporter

    from heartbeat_export.build import build_bundle
    from heartbeat_fast.models.config import PRESETS
    from heartbeat_fast.models.heartbeat import HeartBeat
    from heartbeat_fast.text import Tokenizer

    manifest = bundle.manifest
    config = replace(PRESETS[manifest.preset], frames=manifest.frames, size=manifest.size)
    if axis == "frames":
        longest = max(value, config.denoiser.frames)
        config = replace(config, frames=value, denoiser=replace(config.denoiser, frames=longest))
    else:
        config = replace(config, size=value)
    torch.manual_seed(0)
    tokenizer = Tokenizer.open(bundle.path / manifest.files["tokenizer"].file)
    build_bundle(HeartBeat(config), tokenizer, folder, provenance={"data": "none: random weights"})
    return Bundle.open(folder)


def _axis(found: Sequence[Point], plan: Plan, progress: Progress, name: str) -> dict[str, Any]:
    """Rows {"value", "median_ms", "flop", "samples"} and how they grow."""
    task = progress.add_task(name, total=len(found) * (plan.runs + 1))
    samples: list[list[float]] = [[] for _ in found]
    for i in range(-1, plan.runs):  # the first round warms up
        for point, into in zip(found, samples, strict=True):
            start = time.perf_counter()
            for j in range(point.clips):
                point.generator(
                    point.given, steps=point.steps, seed=10 * (i + 1) + j, sampler=plan.sampler
                )
            if i >= 0:
                into.append((time.perf_counter() - start) * 1e3)
            progress.advance(task)
    rows = [
        {
            "value": point.value,
            "median_ms": float(np.median(times)),
            "flop": _flop(point),
            **summary(times),
            "samples": [round(t, 3) for t in times],
        }
        for point, times in zip(found, samples, strict=True)
    ]
    return {"rows": rows, "growth": growth(rows)}


def growth(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How time grows with the value: the straight line through the medians with its r², the
    exponents of time and of operations over the whole range, and the worst excess of time over
    operations, as a factor, both taken relative to the first row.
    """
    x = np.array([row["value"] for row in rows], float)
    y = np.array([row["median_ms"] for row in rows], float)
    if len(rows) < 2:
        return {}
    slope, intercept = np.polyfit(x, y, 1)
    residual, whole = y - (slope * x + intercept), y - y.mean()
    span = np.log(x[-1] / x[0])
    found: dict[str, Any] = {
        "slope_ms": float(slope),
        "intercept_ms": float(intercept),
        "r2": float(1 - (residual @ residual) / (whole @ whole)),
        "exponent": float(np.log(y[-1] / y[0]) / span),
    }
    if all(row["flop"] for row in rows):
        flop = np.array([row["flop"] for row in rows], float)
        found["flop_exponent"] = float(np.log(flop[-1] / flop[0]) / span)
        found["excess"] = float(((y / y[0]) / (flop / flop[0])).max())
    return found


def _flop(point: Point) -> int | None:
    graphs = flops.bundle_flop(point.generator.bundle)
    return point.clips * flops.clip_flop(graphs, NAMES, point.steps, 1.0) if graphs else None


def _given(bundle: Bundle) -> Conditions:
    manifest = bundle.manifest
    return record(SEED, frames=manifest.frames, size=manifest.size).conditions(NAMES)
