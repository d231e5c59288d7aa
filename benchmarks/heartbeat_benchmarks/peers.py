"""Other systems beside ours, in one run on one machine, random weights where none can be had.

A peer's network is timed pass by pass and a clip is that median times its evaluations, plus its
decoder frame by frame: its own loop would add to that. Ours are timed as whole clips with all
seven conditions, encoders and decoding included: the same checkpoint through the plain pass in
eager torch, and through each engine. Operations are counted on torch's meta device.
"""

import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from heartbeat_benchmarks import flops, probe, validity
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_benchmarks.peer_networks import PEERS, Peer, decode_at, zeros
from heartbeat_benchmarks.plain_engine import PlainEngine
from heartbeat_benchmarks.timing import needed
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import NAMES
from heartbeat_fast.engines.base import open_engine
from heartbeat_fast.errors import EngineError, HeartBeatError
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.config import BASE, HeartBeatConfig
from heartbeat_fast.models.denoiser import Denoiser
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.sampler import choose
from heartbeat_training.phantom import record

SEED = 970_000
EAGER = "eager torch, diffusers style"


@dataclass(frozen=True)
class Way:
    """A row of ours. sampler, bundle: None for the bundle's own and for the plan's."""

    engine: str
    steps: int
    sampler: str | None = None
    bundle: str | None = None


@dataclass(frozen=True)
class Plan:
    """engines: our rows beside the plain pass in eager torch. heavy: time the networks of a billion
    parameters too, given memory and minutes. passes: timed per network; runs: clips per row."""

    bundle: str | None = None
    model: Path = Path(__file__).parents[2] / "heartbeat_fast/bundles/tiny-torch"
    engines: tuple[Way, ...] = (Way("auto", 20), Way("auto", 4, bundle="tiny-fast"))
    eager_steps: int = 20
    runs: int = needed(0.5)
    passes: int = 3
    heavy: bool = False
    only: str = ""
    probe_sides: tuple[int, ...] = probe.SIDES


def run(plan: Plan) -> dict[str, Any]:
    """Count and time everything. Returns the result that `results.save` stores.

    Raises: BundleError, SamplerError, CheckpointError as the generator and the model do.
    """
    bundles = _opened(plan)  # what is wrong with a row is said before minutes of work
    bundle = bundles[None]
    peaks, watch = [probe.measure(plan.probe_sides)], validity.Watch()
    chosen = [peer for peer in (*PEERS, base()) if plan.only.lower() in peer.name.lower()]
    if not chosen:
        raise HeartBeatError(f"--only {plan.only}: no such peer")
    rows = []
    with Progress(transient=True) as progress:
        task = progress.add_task("systems", total=len(chosen) + len(plan.engines) + 1)
        for row in (*_ours(plan, bundles), *(measured(peer, plan) for peer in chosen)):
            rows.append(row)
            progress.advance(task)
    used = watch.read()
    peaks.append(probe.measure(plan.probe_sides))
    return {
        "fingerprint": fingerprint(bundle),
        "workload": asdict(plan) | {"model": plan.model.name},
        "peaks": {"before": peaks[0], "after": peaks[1]},
        "rows": rows,
        "used": used,
        "verdict": validity.verdict(peaks[0], peaks[1], used),
    }


def measured(peer: Peer, plan: Plan) -> dict[str, Any]:
    """A peer's row: operations always, seconds unless it is heavy and that was not asked for."""
    row: dict[str, Any] = {
        "name": peer.name,
        "how": EAGER,
        "frames": peer.frames,
        "size": peer.size,
        "conditions": peer.conditions,
        "evaluations": peer.evaluations,
        "source": peer.source,
        "assumed": peer.assumed,
    }
    row["parameters"], flop = counted(peer.network, peer.call)
    decoder = counted(peer.decoder, peer.decode) if peer.decoder and peer.decode else (0, 0)
    row |= {"pass_flop": flop, "decode_flop": decoder[1] * peer.decodes}
    row["flop"] = flop * peer.evaluations + row["decode_flop"]
    if peer.heavy and not plan.heavy:
        return row | {"seconds": None, "why_not": "heavy: --heavy times it"}
    passes = timed(peer.network, peer.call, plan.passes)
    frames = timed(peer.decoder, peer.decode, plan.passes) if peer.decoder and peer.decode else [0]
    row |= {"pass_s": passes, "decode_frame_s": frames}
    seconds = float(np.median(passes)) * peer.evaluations + float(np.median(frames)) * peer.decodes
    return row | {"seconds": seconds}


def counted(build: Callable[[], nn.Module], call: Callable[[nn.Module], Any]) -> tuple[int, int]:
    """Parameters, and FLOP of one pass, without memory for either."""
    with torch.device("meta"):
        module = build()
    module = module.to("meta").eval()  # some layers make their numbers on the CPU regardless
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(module)
    return sum(p.numel() for p in module.parameters()), int(counter.get_total_flops())


def timed(
    build: Callable[[], nn.Module], call: Callable[[nn.Module], Any], passes: int
) -> list[float]:
    """Seconds of each pass after one that warms up; the module is gone afterwards."""
    torch.manual_seed(0)
    module, samples = build().eval(), []
    with torch.inference_mode():
        for i in range(-1, passes):
            start = time.perf_counter()
            call(module)
            if i >= 0:
                samples.append(round(time.perf_counter() - start, 5))
    del module
    gc.collect()
    return samples


def _opened(plan: Plan) -> dict[str | None, Bundle]:
    """The plan's bundle (None) and those that rows name; each has its rows' steps.

    Raises: BundleError, SamplerError, HeartBeatError: it has not.
    """
    bundles: dict[str | None, Bundle] = {None: Bundle.open(plan.bundle)}
    for way in plan.engines:
        if way.bundle not in bundles:
            bundles[way.bundle] = Bundle.open(way.bundle)
        choose(bundles[way.bundle].samplers(), way.sampler, way.steps)
    if plan.eager_steps not in {steps for _, steps in bundles[None].samplers()}:
        raise HeartBeatError(
            f"bundle {bundles[None].manifest.name}: the plain pass takes {plan.eager_steps} steps, "
            "which it has no table for: name a distilled bundle behind @ in --ours"
        )
    return bundles


def _ours(plan: Plan, bundles: dict[str | None, Bundle]) -> Iterator[dict[str, Any]]:
    """The bundle's own model: plain pass in eager torch, then each engine that runs here."""
    counts = {name: flops.bundle_flop(bundle) for name, bundle in bundles.items()}
    for way in (Way(EAGER, plan.eager_steps), *plan.engines):
        chosen, graphs = bundles[way.bundle], counts[way.bundle]
        manifest = chosen.manifest
        given = record(SEED, frames=manifest.frames, size=manifest.size).conditions(NAMES)
        row: dict[str, Any] = {
            "name": f"HeartBeat {manifest.name} (ours)",
            "frames": manifest.frames,
            "size": manifest.size,
            "conditions": "all seven",
            "evaluations": way.steps,
            "parameters": _parameters(chosen),
            "flop": _flop(graphs, way.steps, way.engine == EAGER) if graphs else None,
            "source": f"bundle {manifest.name}, decode and encoders counted",
            "assumed": "",
        }
        try:
            engine = (
                PlainEngine(HeartBeat.from_pretrained(plan.model), chosen)
                if way.engine == EAGER
                else open_engine(way.engine, chosen)
            )
        except EngineError as error:
            yield row | {"how": way.engine, "seconds": None, "why_not": str(error)}
            continue
        make = Generator(chosen, engine)  # type: ignore[arg-type]
        samples = []
        for i in range(-1, plan.runs):
            start = time.perf_counter()
            clip = make(given, steps=way.steps, sampler=way.sampler, seed=i + 1)
            if i >= 0:
                samples.append(round(time.perf_counter() - start, 5))
        by = way.engine if way.engine == EAGER else f"{engine.name} {engine.precision}"
        row["how"] = f"{by}, {clip.provenance['sampler']}"
        yield row | {"seconds": float(np.median(samples)), "clip_s": samples}


def _parameters(bundle: Bundle) -> int:
    """What the graphs hold of the checkpoint, each tensor once."""
    content = json.loads(bundle.read(bundle.manifest.files["weights_map"]))
    held = (entry for graph in content["graphs"].values() for entry in graph.values())
    return sum({entry["tensor"]: math.prod(entry["shape"]) for entry in held}.values())


def _flop(graphs: dict[str, int], steps: int, plain: bool) -> int:
    """FLOP of a clip; the plain pass repeats at every step what the loop was relieved of."""
    flop = flops.clip_flop(graphs, NAMES, steps, 1.0)
    again = graphs["local"] + graphs["context"] + graphs["time"]
    return flop + (steps - 1) * again if plain else flop


def base(config: HeartBeatConfig = BASE) -> Peer:
    """Our model of the paper's size: what the loop runs, and Stable Diffusion's decoder."""

    def network() -> nn.Module:
        return Denoiser(config.denoiser)

    def call(module: Any) -> Any:
        c, h = config.denoiser, config.latent
        z = zeros(module, 1, config.frames, c.latent_channels, h, h)
        local = zeros(module, 1, config.frames, c.local_channels, h, h)
        text, image = (zeros(module, 1, n, c.context_dim) for n in (78, config.image.grid**2))
        return module(z, zeros(module, 1), local, text, image)

    def decoder() -> nn.Module:
        from heartbeat_benchmarks.peer_networks import autoencoder

        return autoencoder(config.codec.widths)

    return Peer(
        "HeartBeat base (ours)",
        config.frames,
        config.size,
        "all seven",
        20,
        network,
        call,
        source="the preset, random weights",
        assumed="20 steps without guidance, plain pass, encoders of text and image not counted",
        decoder=decoder,
        decode=decode_at(config.latent),
        decodes=config.frames,
        heavy=True,
    )
