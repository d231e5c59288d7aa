"""The gate between an export and its use: how far an engine is from torch on fixed inputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from heartbeat_export.errors import ExportError
from heartbeat_export.rounding import RoundedBundle
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.engines.base import Arrays, Engine
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.blocks import use_kernels
from heartbeat_fast.models.graphs import Tensors
from heartbeat_fast.models.heartbeat import HeartBeat

MAX_ERROR = 1e-3  # relative L2 of any graph's output, at fp32
MIN_PSNR = 40.0  # dB, a whole clip at one seed, at fp32
SAME = 99.0  # dB reported for identical clips, since JSON has no infinity
CLIP_STEPS = 4
LARGE = 512 * 2**20  # bytes of graphs from which the gate holds one at a time


class Bounds(NamedTuple):
    """What passes: a graph's relative L2 error at most, a clip's PSNR in dB at least."""

    error: float
    decibels: float


def bounds(precision: str) -> Bounds:
    """The gate of a precision.

    One rounding errs by 2⁻¹² of a value in fp16 and 2⁻⁹ in bf16, at most twice that, and roundings
    of a few hundred layers add up as a random walk, to about ten of them. So fp16 is given 5e-3 and
    bf16 eight times as much; a wrong weight or a missing cast errs by more than a tenth.
    """
    lower = {"fp16": Bounds(5e-3, 35.0), "bf16": Bounds(4e-2, 25.0)}
    return lower.get(precision, Bounds(MAX_ERROR, MIN_PSNR))


def engine_for(bundle: Bundle, model: HeartBeat) -> Engine:
    """What stands for a bundle in its gate: ONNX Runtime where it computes what the file says, at
    lower precisions the same with every rounding made visible (rounding.py), and for the plugin
    flavour, which no engine loads by itself, `model` in torch with the hb operations."""
    if bundle.manifest.flavour == "plugin":
        return _Operations(model, bundle)
    read, name = bundle, "onnxruntime"
    if (precision := bundle.manifest.precision) != "fp32":
        read = RoundedBundle(bundle.path, bundle.manifest)
        name += f", every value rounded to {precision}"
    engine = (_OneGraph if is_large(bundle) else OnnxRuntimeEngine).open(read)
    engine.name = name
    return engine


def is_large(bundle: Bundle) -> bool:
    """Whether memory and a model call are what a gate has to spare."""
    return sum(spec.bytes for spec in bundle.manifest.graphs.values()) > LARGE


class _OneGraph(OnnxRuntimeEngine):
    """One graph in memory at a time: a session of `base`'s denoiser takes 7 GB beside torch's 5,
    and all eight together do not fit 24."""

    def run(self, graph: str, inputs: Mapping[str, Any]) -> Arrays:
        if graph not in self._sessions:
            self._sessions.clear()
        return super().run(graph, inputs)


class _Operations(TorchEngine):
    """Torch with hb operations; the model computes plainly again after every run."""

    def __init__(self, model: HeartBeat, bundle: Bundle) -> None:
        super().__init__(model, bundle)
        self.name, self._model = "torch, hb operations", model

    def run(self, graph: str, inputs: Any) -> Arrays:
        use_kernels(self._model, "triton")
        try:
            return super().run(graph, inputs)
        finally:
            use_kernels(self._model, "reference")


def relative_error(got: NDArray[Any], wanted: NDArray[Any]) -> float:
    """‖got − wanted‖ / ‖wanted‖, in float64; infinite where `got` is not finite."""
    if not np.isfinite(got).all():
        return float("inf")
    length = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(got.astype(np.float64) - wanted)) / max(length, 1e-12)


def psnr(got: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of 8-bit frames in dB, at most 99."""
    error = np.mean((got.astype(np.float64) - wanted) ** 2)
    return SAME if error == 0 else float(min(SAME, 10 * np.log10(255**2 / error)))


def graph_errors(engine: Engine, reference: Engine, inputs: dict[str, Tensors]) -> dict[str, float]:
    """Per graph the largest relative error of its outputs; inputs from graphs.example_inputs."""
    errors = {}
    for graph, tensors in inputs.items():
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        got, wanted = engine.run(graph, arrays), reference.run(graph, arrays)
        errors[graph] = max(relative_error(got[name], wanted[name]) for name in wanted)
    return errors


def clip_psnr(engine: Generator, reference: Generator) -> float:
    """PSNR of one clip under all conditions, same seed, in dB."""
    manifest = engine.bundle.manifest
    conditions = beating_ring(manifest.frames, manifest.size)
    got, wanted = (g(conditions, steps=CLIP_STEPS, seed=1) for g in (engine, reference))
    return psnr(got.frames, wanted.frames)


def gate(errors: dict[str, float], decibels: float | None, precision: str = "fp32") -> None:
    """Lets an engine pass, or says what is wrong with it. No decibels: no clip was made.

    Raises:
        ExportError: a graph's error or the clip's PSNR is outside `bounds(precision)`.
    """
    most, least = bounds(precision)
    worst = max(errors, key=lambda graph: errors[graph])
    if not errors[worst] <= most:
        raise ExportError(
            f"parity: graph {worst} is {errors[worst]:.2e} from torch; at most {most} passes"
        )
    if decibels is not None and not decibels >= least:
        raise ExportError(f"parity: clip at {decibels:.1f} dB; at least {least} passes")


def beating_ring(frames: int, size: int) -> Conditions:
    """All seven conditions of a ring that contracts once: no anatomy, only something to compare."""
    rows, columns = np.mgrid[:size, :size].astype(np.float32) / size - 0.5
    radius = np.hypot(rows, columns)
    phase = np.sin(np.pi * np.arange(frames) / frames)
    inner = (0.2 - 0.06 * phase)[:, None, None]
    mask = np.where(radius < inner, 1, np.where(radius < 0.35, 2, 0))
    motion = np.gradient(inner, axis=0) * size * (radius < 0.35)
    direction = np.stack([columns, rows]) / np.maximum(radius, 1e-3)
    return Conditions(
        text="An ECHO with 4-chamber view.",
        ef=55.0,
        image=np.where(mask[0] == 2, 0.7, 0.2).astype(np.float32),
        sketch=(np.abs(radius - 0.2) < 0.02).astype(np.float32),
        mask=mask,
        skeleton=((np.abs(rows - inner) < 0.02) & (np.abs(columns) < 0.1)).astype(np.float32),
        flow=(motion[:, None] * direction).astype(np.float32),
        frames=frames,
        size=size,
    )
