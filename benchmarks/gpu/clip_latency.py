"""Whole clips on one GPU, condition set by condition set: plain, compiled, and as we run them.

Random weights: time does not depend on them. A clip is everything from conditions in main memory to
8-bit frames in main memory. Ways: "plain" is the published order of work in eager torch, nothing
moved out of the loop; "compiled" hoists, then torch.compile with CUDA graphs, step by step; "ours"
hoists, Triton kernels, the whole step one captured CUDA graph with the coefficients on the device.
The small decoder is `tiny`'s, with the codec's latent channels. On a machine without a GPU the same
code runs in fp32 without kernels and graphs: a check that it works, not a figure.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heartbeat_benchmarks.sets import conditions_of
from heartbeat_benchmarks.timing import summary
from heartbeat_fast.conditions import NAMES
from heartbeat_fast.models.blocks import use_kernels
from heartbeat_fast.models.codec import Codec, build_codec
from heartbeat_fast.models.config import PRESETS, TINY, HeartBeatConfig
from heartbeat_fast.models.graphs import Tensors
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.models.sampling_loop import Loop
from heartbeat_fast.sampler import SamplerTable

OUT = Path(os.environ.get("OUT", "out/gpu"))
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SETS = ("text", "+image", "+mask", "all", "all-image")
WAYS = ("plain", "compiled", "ours")
# Milliseconds wanted of `base` on an H100, all conditions, our way.
GOALS = {(20, "codec"): 220.0, (4, "small"): 45.0}
PASS_GOAL = 9.8  # 40 % of the measured peak


@dataclass(frozen=True)
class Subject:
    """A model on the device, its decoders, and a clip's inputs in main memory."""

    model: HeartBeat
    decoders: dict[str, Codec]
    inputs: Tensors
    dtype: torch.dtype


def subject(preset: str, dtype: torch.dtype) -> Subject:
    """Random weights everywhere; a codec that cannot be built here is left out."""
    config = PRESETS[preset]
    torch.manual_seed(0)
    small = replace(TINY.codec, latent_channels=config.codec.latent_channels)
    with torch.device(DEVICE):
        model = HeartBeat(config).eval()
        decoders = {"codec": model.codec, "small": build_codec(small).eval()}
        for parameter in model.parameters():  # layers that start at zero would hide an error
            parameter.data.add_(0.01 * torch.randn_like(parameter))
    for module in (model, *decoders.values()):
        module.to(dtype)
    return Subject(model, decoders, clip_inputs(config), dtype)


def clip_inputs(config: HeartBeatConfig) -> Tensors:
    """One clip's conditions, noises, as they come from a host: float32, main memory."""
    F, S, h, text = config.frames, config.size, config.latent, config.text
    tokens = torch.full((1, text.tokens), text.end)
    tokens[:, 0] = text.start
    return {
        "tokens": tokens,
        "ef": torch.full((1, 1), 0.6),
        "image": torch.rand(1, 3, S, S),
        "sketch": torch.rand(1, 1, S, S),
        "mask": torch.rand(1, F, 4, S, S).round(),
        "skeleton": torch.rand(1, F, 1, S, S),
        "flow": torch.randn(1, F, 2, S, S),
        "noise": torch.randn(1, F, config.denoiser.latent_channels, h, h),
        "grain": torch.randn(1, F, 2, S, S),
    }


def table(config: HeartBeatConfig, steps: int) -> SamplerTable:
    """A table of the right shape with made-up weights: its work is that of any sampler's."""
    times = tuple(float(t) for t in np.linspace(config.steps - 1, 0, steps).round())
    rows = tuple((0.9, *(0.0,) * i, 0.1) for i in range(steps))
    return SamplerTable("timing", steps, config.prediction, times, 1.0, (1.0,) * steps, rows)


class Runner:
    """Clips of one subject in one way; what a way prepares is prepared in its first clip."""

    def __init__(self, on: Subject, way: str, decoder: str) -> None:
        self.on, self.way = on, way
        use_kernels(on.model, "triton" if way == "ours" and GPU else "reference")
        self.decode: Callable[..., Tensor] = on.decoders[decoder].decode
        self.step: Callable[..., Tensor] = on.model.denoiser.denoise
        if way == "compiled" and GPU:
            torch.compiler.reset()
            self.step = torch.compile(self.step, mode="reduce-overhead")
            self.decode = torch.compile(self.decode)
        self.loops: dict[tuple[int, bool], Loop] = {}

    @torch.inference_mode()
    def clip(self, present: tuple[str, ...], steps: int) -> np.ndarray[Any, Any]:
        """Conditions to frames (F,H,W) uint8, both in main memory."""
        model, dtype = self.on.model, self.on.dtype
        given = {
            k: v.to(DEVICE, dtype if v.is_floating_point() else None, non_blocking=True)
            for k, v in self.on.inputs.items()
        }
        given["present"] = torch.tensor([[float(n in present) for n in NAMES]]).to(DEVICE, dtype)
        text = model.text_context(given["tokens"], given["ef"], given["present"])
        image = None
        if "image" in present:
            image = model.image_context(given["image"], given["present"])
        sampler = table(self.on.model.config, steps)
        run = self._plain if self.way == "plain" else self._hoisted
        z = run(sampler, given, text, image).to(dtype)
        frames = self.decode(z.flatten(0, 1), given["grain"].flatten(0, 1))[:, 0]
        return (frames.float().clamp(0, 1) * 255 + 0.5).byte().cpu().numpy()

    def _plain(
        self, sampler: SamplerTable, given: Tensors, text: Tensor, image: Tensor | None
    ) -> Tensor:
        """Local features, keys, values and time embedding anew at every step."""
        names = ("sketch", "mask", "skeleton", "flow", "present")
        start = z = given["noise"]
        for i, t in enumerate(sampler.timesteps):
            local = self.on.model.local_features(*(given[name] for name in names))
            when = torch.tensor([t], device=z.device)
            out = self.on.model.denoiser(z, when, local, text, image)
            row = sampler.weights[i]
            z = row[0] * start + row[-1] * out
        return z

    def _hoisted(
        self, sampler: SamplerTable, given: Tensors, text: Tensor, image: Tensor | None
    ) -> Tensor:
        """What does not change with the step is made once; the loop runs on the device."""
        denoiser = self.on.model.denoiser
        names = ("sketch", "mask", "skeleton", "flow", "present")
        local = self.on.model.local_features(*(given[name] for name in names))
        conditions = [[denoiser.local_share(local), *denoiser.context(text, image)]]
        times = torch.tensor(sampler.timesteps, device=DEVICE)
        key = (sampler.steps, image is None)
        if key not in self.loops:
            self.loops[key] = Loop(
                lambda z, temb, share, *kv: self.step(z, temb, share, kv),
                self.on.dtype,
                sampler.steps,
                conditions,
                capture=self.way == "ours" and GPU,
            )
        temb = denoiser.time(times).float()
        return self.loops[key].run(sampler, temb, conditions, 1.0, given["noise"].float())


def peak_tflops(dtype: torch.dtype) -> float:
    """Best product of two square matrices on this device now."""
    side = 8192 if GPU else 512
    a, b = torch.randn(2, side, side, device=DEVICE).to(dtype).unbind()
    return 2 * side**3 / min(samples(lambda: a @ b, 20, 0.0)) / 1e12


def samples(call: Callable[[], object], least: int, seconds: float) -> list[float]:
    """Seconds of each call after three that warm up: `least` of them, more while time is left."""
    taken: list[float] = []
    synchronise = torch.cuda.synchronize if GPU else lambda: None
    for i in range(-3, 1000):
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        if i >= 0:
            taken.append(time.perf_counter() - start)
        if len(taken) >= least and sum(taken) > seconds:
            break
    return taken


@cache
def flop(config: HeartBeatConfig, image: bool) -> tuple[int, int]:
    """Of one pass of the loop, and of the codec's decoding of a clip; counted without running."""
    from torch.utils.flop_counter import FlopCounterMode

    c, F, h = config.denoiser, config.frames, config.latent
    with torch.device("meta"):
        model = HeartBeat(config).to("meta").eval()
        z = torch.zeros(1, F, c.latent_channels, h, h)
        share = torch.zeros(1, F, c.channels[0], h, h)
        text = torch.zeros(1, config.text.tokens + 1, c.context_dim)
        tokens = torch.zeros(1, config.image.grid**2, c.context_dim) if image else None
        kv = model.denoiser.context(text, tokens)
        temb = model.denoiser.time(torch.zeros(1))
        grain = torch.zeros(F, 2, config.size, config.size)
        with FlopCounterMode(display=False) as once, torch.no_grad():
            model.denoiser.denoise(z, temb, share, kv)
        with FlopCounterMode(display=False) as decoding, torch.no_grad():
            model.codec.decode(z.flatten(0, 1), grain)
    return int(once.get_total_flops()), int(decoding.get_total_flops())


def rows(
    on: Subject, ways: tuple[str, ...], names: tuple[str, ...], least: int, budget: float
) -> Iterator[dict[str, Any]]:
    """Every way, set and step count: first the sets at 20 steps, then few steps, small decoder."""
    peak = peak_tflops(on.dtype)
    plan = [(name, 20, "codec") for name in names]
    plan += [("all", steps, decoder) for steps in (1, 2, 4) for decoder in ("codec", "small")]
    end = time.monotonic() + budget
    reference: dict[tuple[str, int, str], np.ndarray[Any, Any]] = {}
    for way in ways:
        runners = {decoder: Runner(on, way, decoder) for decoder in on.decoders}
        for name, steps, decoder in plan:
            row: dict[str, Any] = {"way": way, "set": name, "steps": steps, "decoder": decoder}
            if time.monotonic() > end:
                yield row | {"why_not": "no time left: give --minutes"}
                continue
            present, run = conditions_of(name), runners[decoder].clip
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            use_kernels(on.model, "triton" if way == "ours" and GPU else "reference")
            frames = run(present, steps).astype(np.float32)
            wanted = reference.setdefault((name, steps, decoder), frames)
            error = float(np.sqrt(np.mean((frames - wanted) ** 2)))
            taken = samples(partial(run, present, steps), least, 1.5 * GPU)
            memory = torch.cuda.max_memory_allocated() / 2**20 if GPU else None
            ms = [1e3 * t for t in taken]
            row |= {"ms": summary(ms) | {"samples": ms}, "memory_mb": memory}
            row |= {"grey_levels_from_plain": error, "peak_tflops": peak}
            once, decoding = flop(on.model.config, "image" in present)
            work = once * steps + (decoding if decoder == "codec" else 0)
            yield row | {"share_of_peak": work / np.median(taken) / peak / 1e12, "pass_flop": once}


def denoiser_pass(on: Subject, way: str, least: int) -> dict[str, Any]:
    """One pass of the loop alone, all conditions: by the slope between 4 and 12 steps, so that
    what a clip costs once falls out."""
    run = Runner(on, way, "small").clip
    medians = [np.median(samples(partial(run, NAMES, n), least, 1.0 * GPU)) for n in (4, 12)]
    return {"way": way, "pass_ms": float(1e3 * (medians[1] - medians[0]) / 8)}


def main() -> None:
    """Measures, writes $OUT/clip-PRESET.json, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--runs", type=int, default=7, help="at least, of each row")
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args()
    on = subject(options.preset, torch.bfloat16 if GPU else torch.float32)
    ways, names = (tuple(text.split(",")) for text in (options.ways, options.sets))
    name = torch.cuda.get_device_name() if GPU else "cpu: a dry run, no figure"
    result: dict[str, Any] = {"gpu": name, "torch": torch.__version__, "preset": options.preset}
    result |= {
        "dtype": str(on.dtype),
        "frames": on.model.config.frames,
        "size": on.model.config.size,
    }
    result["passes"] = [denoiser_pass(on, way, options.runs) for way in ways]
    result["rows"] = []
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"clip-{options.preset}.json"
    for row in rows(on, ways, names, options.runs, 60 * options.minutes):
        result["rows"].append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept
    print(f"\n{name}, {options.preset}, {on.dtype}: ms a clip (median), share of matmul peak, MB")
    for one in result["passes"]:
        print(f"one pass of the loop, {one['way']:8} {one['pass_ms']:8.2f} ms")
    for row in result["rows"]:
        print(line(row, on.model.config.frames))
    if options.preset == "base" and GPU:
        print(f"goals on an H100: pass {PASS_GOAL} ms, clips {GOALS} ms")


def line(row: dict[str, Any], frames: int) -> str:
    """A row as text."""
    head = f"{row['way']:8} {row['set']:10} {row['steps']:3} steps {row['decoder']:6}"
    if "why_not" in row:
        return f"{head} not run: {row['why_not']}"
    ms = float(np.median(row["ms"]["samples"]))
    memory = "" if row["memory_mb"] is None else f" {row['memory_mb']:7.0f} MB"
    return (
        f"{head} {ms:9.2f} ms {1e3 * frames / ms:8.1f} frames/s "
        f"{100 * row['share_of_peak']:5.1f} %{memory}"
    )


if __name__ == "__main__":
    main()
