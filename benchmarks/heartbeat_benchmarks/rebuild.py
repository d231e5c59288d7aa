"""New weights into a bundle against exporting it again, in one run on one machine.

The full export (trace all graphs, write, parity gate) is timed first and makes the bundle. Then
the parameters that a stage trains move a little, as training moves them, and the bundle is rebuilt
to the moved weights and back, again and again. What is timed is what `heartbeat-export rebuild`
does after its imports: read the checkpoint, decide, write, gate, switch; the command from its start
is timed apart, once, and so is what a running generator pays, where it fits beside all this.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from heartbeat_benchmarks import probe, results
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_export.build import build_bundle, load_folder
from heartbeat_export.rebuild import rebuild
from heartbeat_fast.bundle import EMBEDDED, Bundle
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.config import PRESETS
from heartbeat_fast.models.heartbeat import HeartBeat, stage_parameters

MODEL = EMBEDDED.parent / "tiny-torch"
MOVED = 1e-3  # of each tensor's deviation: about what some hundred training steps move it
ENGINE = "onnxruntime"
STATS = 1000


def run(model: Path = MODEL, runs: int = 7, preset: str = "", stage: int = 2) -> dict[str, Any]:
    """Times of a full export, of rebuilds, of the command, and of a running generator's switch.

    Args:
        model: a model folder.  preset: random weights of a preset instead, e.g. "base".
        runs: rebuilds to the moved weights and back, in turn.
        stage: 1 or 2: what that stage trains moves; 0: everything does.

    Raises:
        HeartBeatError: no model there, or parity missed.
    """
    before = probe.measure()
    with tempfile.TemporaryDirectory() as scratch:
        folder, bundle = Path(scratch), Path(scratch) / "bundle"
        checkpoints = [folder / "a", folder / "b"]
        moved = _save(model, preset, checkpoints, stage)
        large = preset == "base"
        full = _apart(large, _export, checkpoints[0], bundle)
        generator = None if large else Generator.open(bundle, ENGINE)
        rows = []
        for i in range(runs):
            rows.append(_apart(large, _rebuild, bundle, checkpoints[(i + 1) % 2]))
            if generator is not None:
                rows[-1]["reload_s"] = _taken(generator)
        command = _command(checkpoints[(runs + 1) % 2], bundle)
        found = {"fingerprint": fingerprint(Bundle.open(bundle)), "rows": rows}
    seconds = [row["seconds"]["all"] for row in rows]
    return found | {
        "workload": {
            "model": preset or model.name,
            "stage": stage,
            "moved": {"parameters": moved, "by": MOVED},
            "runs": runs,
            "gate": "every changed graph once, on onnxruntime against torch"
            + (", pictures at half their side" if large else ""),
        },
        "matrix_products": [before, probe.measure()],
        "summary": {
            "full_export_s": full,
            "rebuild_s": {"n": runs, "min": min(seconds), "median": median(seconds)},
            "ratio": full / median(seconds),
            "command_swap_s": command,
            "roads": sorted({row["road"] for row in rows}),
        }
        | _running(generator, rows),
    }


def _export(checkpoint: Path, bundle: Path) -> float:
    """Seconds of a full export, from reading the checkpoint to the gate."""
    start = time.perf_counter()
    given, tokenizer, provenance, card = load_folder(checkpoint)
    build_bundle(given, tokenizer, bundle, provenance=provenance, card=card)
    return time.perf_counter() - start


def _rebuild(bundle: Path, checkpoint: Path) -> dict[str, Any]:
    """What a rebuild reports, changed tensors as their number."""
    report = rebuild(bundle, checkpoint)
    return report.to_dict() | {"changed": sum(map(len, report.changed.values()))}


def _apart(large: bool, work: Callable[..., Any], *arguments: Path) -> Any:
    """A call; of a large model in a process of its own, as the command would be: memory that one
    export leaves to the allocator and the next one's did not fit 24 GB together."""
    if not large:
        return work(*arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def _save(model: Path, preset: str, checkpoints: list[Path], stage: int) -> int:
    """The model's folder and one with a stage's parameters moved; returns how many numbers that
    is."""
    given, tokenizer, _, _ = load_folder(model)
    if preset:
        torch.manual_seed(0)
        given = HeartBeat(PRESETS[preset]).eval()
    rng = torch.Generator().manual_seed(1)
    moved = stage_parameters(given, stage) if stage else dict(given.named_parameters())
    for i, folder in enumerate(checkpoints):
        with torch.no_grad():
            for parameter in moved.values() if i else ():
                step = MOVED * (parameter.std() if parameter.numel() > 1 else 1.0)
                parameter.add_(step * torch.randn(parameter.shape, generator=rng))
        given.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
    return sum(parameter.numel() for parameter in moved.values())


def _running(generator: Generator | None, rows: list[dict[str, Any]]) -> dict[str, float]:
    """What new weights cost a running generator: to load them, and to look for some each clip."""
    if generator is None:
        return {}
    return {"reload_s": median(row["reload_s"] for row in rows), "look_us": _look(generator)}


def _taken(generator: Generator) -> float:
    """Seconds in which a running generator loads and tries the new version."""
    start, old = time.perf_counter(), generator.bundle
    with generator.turn():
        taken = time.perf_counter() - start
    assert generator.bundle is not old, "the generator did not take the new weights up"
    return taken


def _look(generator: Generator) -> float:
    """Microseconds that a clip pays where nothing is new."""
    start = time.perf_counter()
    for _ in range(STATS):
        with generator.turn():
            pass
    return (time.perf_counter() - start) / STATS * 1e6


def _command(checkpoint: Path, bundle: Path) -> float:
    """Seconds of the command from its start, interpreter and imports included."""
    command = [sys.executable, "-m", "heartbeat_export.cli", "rebuild", str(checkpoint)]
    start = time.perf_counter()
    subprocess.run([*command, "--bundle", str(bundle)], check=True, capture_output=True)
    return time.perf_counter() - start


def markdown(result: dict[str, Any]) -> str:
    """What was measured, for documents."""
    s, work = result["summary"], result["workload"]
    rows = [
        ["full export with its gate", results.number(s["full_export_s"], 1)],
        [f"rebuild ({', '.join(s['roads'])}), median", results.number(s["rebuild_s"]["median"], 2)],
    ]
    rows += [[f"of it {name}", results.number(t, 2)] for name, t in _stages(result).items()]
    if "command_swap_s" in s:  # older results timed a command that had nothing to do
        rows.append(["the command from its start", results.number(s["command_swap_s"], 1)])
    if "reload_s" in s:
        rows.append(["a running generator's switch", results.number(s["reload_s"], 2)])
    moved = f"{work['moved']['parameters'] / 1e6:.1f} M numbers"
    runs = "one rebuild" if work["runs"] == 1 else f"{work['runs']} rebuilds, there and back,"
    return (
        f"{results.markdown(['s', work['model']], rows)}\n\n**{s['ratio']:.1f} times** faster than "
        f"the full export: {runs} to moved weights ({moved}, what stage "
        f"{work['stage']} trains) on {result['fingerprint']['machine']['cores']} cores."
    )


def _stages(result: dict[str, Any]) -> dict[str, float]:
    """Median seconds of each stage."""
    rows = result["rows"]
    return {
        name: median(row["seconds"].get(name, 0.0) for row in rows)
        for name in rows[0]["seconds"]
        if name != "all"
    }


def table(result: dict[str, Any]) -> str:
    """What was measured, in lines."""
    s = result["summary"]
    times = ", ".join(f"{name} {value:.2f}" for name, value in _stages(result).items())
    running = ""
    if "reload_s" in s:
        running = (
            f"; a running generator loads the new version in {s['reload_s']:.2f} s, looks for one "
            f"in {s['look_us']:.1f} µs a clip"
        )
    return (
        f"full export {s['full_export_s']:.1f} s\n"
        f"rebuild ({', '.join(s['roads'])}) {s['rebuild_s']['median']:.2f} s, best of "
        f"{s['rebuild_s']['n']} {s['rebuild_s']['min']:.2f} s: {times}\n"
        f"ratio {s['ratio']:.1f}\n"
        f"command from its start {s['command_swap_s']:.1f} s{running}"
    )
