"""The parity gate of new weights: the graphs that changed, against torch, each called once.

A full export compares all graphs and a clip of 4 steps (build.py). Here the graphs are the ones
that passed then, with other numbers in them: a wrong number shows in whatever goes through it, so
inputs are fixed ones, and no graph that did not change is loaded, for `base` a SAM and a CLIP. What
the smaller changed graphs make (keys and values, time embeddings, local features) is made in torch.
A large bundle's graphs run at a quarter of their size (smaller.py), and at their own only where
that cannot be or does not pass: what fails is said of the graph as it is used.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from heartbeat_export import parity, store
from heartbeat_export.errors import ExportError
from heartbeat_export.smaller import SmallerGraph
from heartbeat_fast.bundle import Bundle, TensorSpec
from heartbeat_fast.engines.base import Arrays, Engine
from heartbeat_fast.models.graphs import HALF_FROM, build_graphs
from heartbeat_fast.models.heartbeat import HeartBeat

SEED = 1
MADE_BY = {"temb": "time", "local": "local"}  # an input of denoise → the graph that puts it out
PIXELS = 8  # of a picture's side to one of its latents'
NORMAL = ("z", "noise", "flow", "text_context", "image_context")


def measure(
    bundle: Bundle, engine: Engine, model: HeartBeat, changed: Iterable[str]
) -> dict[str, float]:
    """How far a bundle on an engine is from torch, where it changed: relative L2 by graph.

    Args:
        model: with the new weights, rounded as the bundle stores them or not.
        changed: names of the graphs that are not the ones that passed before.
    """
    most, errors = parity.bounds(bundle.manifest.precision).error, {}
    for graph in sorted(changed):
        found = _at_smaller_size(bundle, model, graph)
        if found is None or not found <= most:
            inputs = _Inputs(bundle, model)
            found = inputs.compare(graph, inputs.of(bundle.manifest.graphs[graph].inputs), engine)
        errors[graph] = found
    return errors


def _at_smaller_size(bundle: Bundle, model: HeartBeat, graph: str) -> float | None:
    """The error of a smaller graph with the file's weights; None where there is none."""
    manifest = bundle.manifest
    exact = (manifest.precision, manifest.flavour) == ("fp32", "standard")
    if not exact or not parity.is_large(bundle):
        return None
    try:
        smaller = SmallerGraph(store.mapped(bundle, manifest.graphs[graph]))
        inputs = _Inputs(bundle, model)
        return inputs.compare(graph, inputs.of(smaller.inputs), smaller)
    except ExportError:
        return None


class Runner(Protocol):
    """What runs a graph: an engine, or the one graph it holds."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Its outputs."""
        ...


class Reference:
    """A model's graphs in torch, with the numbers that a bundle holds."""

    def __init__(self, model: HeartBeat) -> None:
        self._graphs = build_graphs(model)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """One graph's outputs."""
        found = self._graphs[graph]
        tensors = [torch.from_numpy(inputs[name]) for name in found.inputs]
        with torch.inference_mode(), _InHalf():
            values = found.module(*tensors)
        values = values if isinstance(values, tuple) else (values,)
        return {k: v.numpy() for k, v in zip(found.outputs, values, strict=True)}


class _InHalf(TorchFunctionMode):
    """Every large parameter rounded to half where it is used, as graphs.round_to_half would round
    it in place; a rounded model of `base` is another 4.4 GB, and memory costs 2.6 s a GB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # .shape, .dtype
            args, kwargs = _pytree.tree_map_only(nn.Parameter, _rounded, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _rounded(parameter: nn.Parameter) -> torch.Tensor:
    return parameter.half().float() if parameter.numel() >= HALF_FROM else parameter


class _Inputs:
    """Fixed inputs by name and shape, all conditions present."""

    def __init__(self, bundle: Bundle, model: HeartBeat) -> None:
        self.reference = Reference(model)
        self._bundle, self._text = bundle, model.config.text
        self._made: dict[str, Arrays] = {}

    def of(self, specs: Iterable[TensorSpec]) -> Arrays:
        """The inputs of a graph."""
        return {spec.name: self._value(spec) for spec in specs}

    def compare(self, graph: str, given: Arrays, runner: Runner) -> float:
        """The largest relative L2 of a graph's outputs to torch's."""
        wanted = self.reference.run(graph, given)
        got = runner.run(graph, given)
        return max(parity.relative_error(got[key], wanted[key]) for key in wanted)

    def _value(self, spec: TensorSpec) -> NDArray[Any]:
        rng = np.random.Generator(np.random.PCG64([SEED, zlib.crc32(spec.name.encode())]))
        source = "context" if spec.name.startswith("kv_") else MADE_BY.get(spec.name)
        if source is not None:
            return self._output(source, spec)
        if spec.name == "tokens":  # twelve words, then the end to the last
            tokens = rng.integers(self._text.vocab - 2, size=spec.shape)
            tokens[:, 0], tokens[:, 12:] = self._text.start, self._text.end
            return tokens
        if spec.name in ("present", "t"):
            return np.full(spec.shape, 1 if spec.name == "present" else 500, spec.dtype)
        draw = rng.standard_normal if spec.name in NORMAL else rng.random
        return draw(spec.shape, np.float32)

    def _output(self, graph: str, wanted: TensorSpec) -> NDArray[Any]:
        """What a graph before puts out, of pictures of a size that makes it as it is wanted."""
        if graph not in self._made:
            specs = self._bundle.manifest.graphs[graph].inputs
            if graph == "local":
                side = wanted.shape[-1] * PIXELS
                specs = tuple(
                    replace(s, shape=(*s.shape[:-2], side, side)) if len(s.shape) > 3 else s
                    for s in specs
                )
            self._made[graph] = self.reference.run(graph, self.of(specs))
        return self._made[graph][wanted.name]
