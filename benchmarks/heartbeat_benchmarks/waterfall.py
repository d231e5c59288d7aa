"""Where the speed comes from: one change at a time, all rungs in one run, quality beside each.

Rungs take turns clip by clip on the same held-out phantoms, so a drifting machine wrongs none.
A rung is judged on the clips that were timed: SSIM with the source, LV Dice, texture spectrum. What
cannot run here is named with its reason and left out. Times are seconds of wall clock a clip.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from heartbeat_benchmarks import probe, validity
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_benchmarks.timing import needed, summary
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.engines.base import open_engine
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.generator import TEMPERATURE, Generator, Stopwatch
from heartbeat_fast.sampler import pick
from heartbeat_training.evaluate import HELD_OUT, Case, Judge, measure, open_case

REFERENCE = "reference: eager torch"
HOISTED = "step-invariant work hoisted"
SMALL, PIPELINED = "small decoder", "decode beside the next clip"
# What the fastest rung may lose against the reference, and how much faster it must be.
MAX_SSIM, MAX_DICE, MAX_DB, MIN_SPEEDUP = 0.02, 0.02, 1.0, 15.0

Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Plan:
    """model: torch folder of the bundle's weights. fast: bundle of the few-step student, with a
    small decoder; None: the many-step model takes few steps, and its decoder stays."""

    bundle: str | None = None
    model: Path = Path(__file__).parents[2] / "heartbeat_fast/bundles/tiny-torch"
    fast: str | None = None
    steps: int = 20
    few: int = 4
    clips: int = needed(0.5)
    first_seed: int = HELD_OUT.start
    probe_sides: tuple[int, ...] = probe.SIDES


@dataclass(frozen=True)
class Rung:
    """A way to make clips: who encodes and denoises, who decodes, by which table."""

    name: str
    make: Generator
    decode: Generator
    sampler: str
    steps: int
    asked: str = "onnxruntime"  # the engine, as open_engine takes it
    pipelined: bool = False

    def latents(self, given: Conditions, seed: int, watch: Stopwatch) -> NDArray[np.float32]:
        """Conditions to clean latents."""
        table = pick(self.make.bundle.samplers(), self.sampler, self.steps)
        encoded = self.make.encode(given, watch)
        return self.make.denoise(encoded, table, 1.0, seed, watch, None, TEMPERATURE)

    def clip(self, given: Conditions, seed: int) -> tuple[Frames, dict[str, float]]:
        """Frames, and milliseconds by stage."""
        watch = Stopwatch()
        z = self.latents(given, seed, watch)
        return self.decode.decode(z, given.flow, seed, watch), dict(watch.ms)


@dataclass
class Ladder:
    """The rungs that run here and the reasons of those that do not. Each warms up on `given`: what
    an engine lacks may show only then."""

    given: Conditions
    rungs: list[Rung] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, make: Callable[[], Rung]) -> None:
        """A rung, or why it is not there."""
        try:
            rung = make()
            rung.clip(self.given, 0)
            self.rungs.append(rung)
        except HeartBeatError as error:
            self.absent[name] = str(error)


def run(plan: Plan, judge: Judge) -> dict[str, Any]:
    """Time and judge every rung. Returns the result that `results.save` stores.

    Raises: BundleError, SamplerError as the generator does.
    """
    bundle = Bundle.open(plan.bundle)
    printed = fingerprint(bundle)
    size = bundle.manifest.frames, bundle.manifest.size
    cases = [open_case(plan.first_seed + i, *size) for i in range(plan.clips)]
    ladder = build(plan, bundle, cases[0].conditions)
    peaks, watch = [probe.measure(plan.probe_sides)], validity.Watch()
    clips: dict[str, list[Frames]] = {rung.name: [] for rung in ladder.rungs}
    rows: dict[str, dict[str, list[float]]] = {rung.name: {} for rung in ladder.rungs}
    with Progress(transient=True) as progress:
        task = progress.add_task("clips", total=len(ladder.rungs) * len(cases))
        for name, frames, stages in _turns(ladder.rungs, cases):
            progress.advance(task)
            clips[name].append(frames)
            for stage, value in stages.items():
                rows[name].setdefault(stage, []).append(value)
    used = watch.read()
    peaks.append(probe.measure(plan.probe_sides))
    quality = {name: _quality(cases, made, judge) for name, made in clips.items()}
    found = [_row(rung, rows[rung.name], quality) for rung in ladder.rungs]
    _compare(found)
    workload = asdict(plan) | {"frames": size[0], "size": size[1], "conditions": "all"}
    return {
        "fingerprint": printed
        | ({"fast": Bundle.open(plan.fast).manifest.identity()} if plan.fast else {}),
        "workload": workload | {"model": plan.model.name},
        "peaks": {"before": peaks[0], "after": peaks[1]},
        "rows": found,
        "absent": ladder.absent,
        "targets": targets(found),
        "used": used,
        "verdict": validity.verdict(peaks[0], peaks[1], used),
    }


def build(plan: Plan, bundle: Bundle, given: Conditions) -> Ladder:
    """The rungs, top to bottom; each changes one thing about the one above it that runs here."""
    ladder = Ladder(given)

    def torch_rung(plain: bool) -> Rung:
        # torch is imported by the rungs that need it
        from heartbeat_benchmarks.plain_engine import PlainEngine
        from heartbeat_fast.engines.torch_engine import TorchEngine
        from heartbeat_fast.models.heartbeat import HeartBeat

        model = HeartBeat.from_pretrained(plan.model)
        engine = PlainEngine(model, bundle) if plain else TorchEngine(model, bundle)
        generator = Generator(bundle, engine)  # type: ignore[arg-type]
        name = REFERENCE if plain else HOISTED
        return Rung(name, generator, generator, "dpmpp_2m", plan.steps)

    def engine_rung(name: str, engine: str) -> Rung:
        generator = Generator(bundle, open_engine(engine, bundle))
        return Rung(name, generator, generator, "dpmpp_2m", plan.steps, engine)

    ladder.add(REFERENCE, lambda: torch_rung(True))
    ladder.add(HOISTED, lambda: torch_rung(False))
    for name, engine in (
        ("ONNX Runtime fp32", "onnxruntime"),
        ("OpenVINO fp32", "openvino:fp32"),
        ("OpenVINO bf16", "openvino:bf16"),
        ("OpenVINO int8", "openvino:int8"),
    ):
        ladder.add(name, lambda name=name, engine=engine: engine_rung(name, engine))  # type: ignore[misc]
    _few(ladder, plan)
    return ladder


def _few(ladder: Ladder, plan: Plan) -> None:
    """Few steps, the small decoder, and decoding beside the next clip, on the last engine that
    does not change the clip: int8 does."""
    last = [rung for rung in ladder.rungs if rung.make.engine.precision != "int8"][-1]
    name = f"{plan.few} steps ({last.make.engine.name} {last.make.engine.precision})"
    if plan.fast is None:
        few = replace(last, name=f"{name}, no student", steps=plan.few)
        ladder.add(few.name, lambda: few)
        ladder.absent[SMALL] = "no bundle with one was given: --fast"
    else:
        student = Bundle.open(plan.fast)
        make = Generator(student, open_engine(last.asked, student))
        few = Rung(name, make, last.decode, "few_step", plan.few, last.asked)
        if _same_latents(student, last.make.bundle):
            ladder.add(few.name, lambda few=few: few)  # type: ignore[misc]
        else:
            ladder.absent[name] = "its latents are not the large decoder's: see the next rung"
        few = small = replace(few, name=SMALL, decode=make)
        ladder.add(small.name, lambda: small)
        least = min(count for name, count in student.samplers() if name == "few_step")
        if least < plan.few:
            few = replace(small, name=f"{least} step{'s' * (least > 1)}", steps=least)
            ladder.add(few.name, lambda: few)
    ladder.add(PIPELINED, lambda: replace(few, name=PIPELINED, pipelined=True))


def _same_latents(one: Bundle, other: Bundle) -> bool:
    """Whether two bundles' codecs encode alike, so that either decodes the other's latents."""
    digests = [b.manifest.graphs["encode"].sha256 for b in (one, other)]
    return digests[0] == digests[1]


def _turns(
    rungs: Sequence[Rung], cases: Sequence[Case]
) -> Iterator[tuple[str, Frames, dict[str, float]]]:
    """(rung, frames, ms by stage and "total") of every case, rungs in turns. A pipelined rung's
    total is a clip's share of two running abreast."""
    with ThreadPoolExecutor(1) as beside:
        for case in cases:
            for rung in rungs:
                if rung.pipelined:
                    yield rung.name, *_abreast(rung, case, beside)
                    continue
                start = time.perf_counter()
                frames, stages = rung.clip(case.conditions, case.seed)
                yield rung.name, frames, stages | {"total": (time.perf_counter() - start) * 1e3}


def _abreast(rung: Rung, case: Case, beside: ThreadPoolExecutor) -> tuple[Frames, dict[str, float]]:
    """A clip decoded while the next one denoises; its time is until both are done, which is what
    every clip of a steady stream costs."""
    watch = Stopwatch()
    z = rung.latents(case.conditions, case.seed, Stopwatch())
    start = time.perf_counter()
    decoded = beside.submit(rung.decode.decode, z, case.conditions.flow, case.seed, Stopwatch())
    rung.latents(case.conditions, case.seed + 1, watch)
    frames = decoded.result()
    return frames, dict(watch.ms) | {"total": (time.perf_counter() - start) * 1e3}


def _quality(cases: Sequence[Case], made: Sequence[Frames], judge: Judge) -> dict[str, Any]:
    """Means of SSIM and Dice, and the mean spectrum in dB; raw rows beside them."""
    rows = [measure(case, case, clip, judge(clip)) for case, clip in zip(cases, made, strict=True)]
    spectra = np.array([row["spectrum_db"] for row in rows])
    judged = spectra[np.isfinite(spectra).all(1)]  # a clip without tissue has no spectrum
    mean = judged.mean(0) if len(judged) else np.full(spectra.shape[1], np.nan)
    return {
        "ssim": float(np.mean([row["ssim"] for row in rows])),
        "dice": float(np.mean([row["dice"] for row in rows])),
        "spectrum_db": mean.tolist(),
        "flicker": float(np.mean([row["flicker"] for row in rows])),
        "rows": rows,
    }


def _row(rung: Rung, stages: dict[str, list[float]], quality: dict[str, Any]) -> dict[str, Any]:
    engine = rung.make.engine
    times = {
        stage: summary(values) | {"samples": [round(v, 3) for v in values]}
        for stage, values in stages.items()
    }
    return {
        "name": rung.name,
        "engine": engine.name,
        "precision": engine.precision,
        "sampler": rung.sampler,
        "steps": rung.steps,
        "median_ms": float(np.median(stages["total"])),
        "stages": times,
        "quality": quality[rung.name],
    }


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to every row its speed-up, over the first and over the one above, and what it loses
    against the first: SSIM, Dice, and dB in the worst band of the mean spectra."""
    first = rows[0]
    for above, row in zip((first, *rows), rows, strict=False):
        row["speedup"] = first["median_ms"] / row["median_ms"]
        row["step_gain"] = above["median_ms"] / row["median_ms"]
        mine, theirs = row["quality"], first["quality"]
        row["ssim_change"] = mine["ssim"] - theirs["ssim"]
        row["dice_change"] = mine["dice"] - theirs["dice"]
        gaps = np.abs(np.subtract(mine["spectrum_db"], theirs["spectrum_db"]))
        row["spectrum_db"] = float(gaps.max()) if gaps.size else float("nan")


def targets(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the fastest rung promises against the first; nothing where the first is not there."""
    first, last = rows[0], min(rows, key=lambda row: float(row["median_ms"]))
    if first["name"] != REFERENCE:
        return []
    checks = (
        (f"times faster than the reference ({last['name']})", last["speedup"], MIN_SPEEDUP, True),
        ("SSIM lost or won", abs(last["ssim_change"]), MAX_SSIM, False),
        ("LV Dice lost or won", abs(last["dice_change"]), MAX_DICE, False),
        ("texture spectrum, worst band (dB)", last["spectrum_db"], MAX_DB, False),
    )
    return [
        {"what": what, "value": value, "bound": bound, "at_least": up}
        | {"kept": bool(value >= bound if up else value <= bound)}
        for what, value, bound, up in checks
    ]
