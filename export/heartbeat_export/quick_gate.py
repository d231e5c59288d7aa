"""The parity gate of new weights: the graphs that changed, against torch, and one clip.

A full export compares all graphs and a clip of 4 steps (build.py). Here the graphs are the ones
that passed then, with other numbers in them, so each is compared where it changed, on the tensors
that a clip of the fewest steps really sends through it: torch makes that clip once, and its inputs
and outputs are kept as the reference. Graphs that did not change run on the engine on both sides,
and never twice on the same inputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_export import parity
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays, Engine
from heartbeat_fast.generator import Generator

SEED = 1


@dataclass
class Gate:
    """What was measured: relative L2 per changed graph, and the clip in dB."""

    errors: dict[str, float]
    decibels: float


class _Mixed:
    """Changed graphs in torch, the others on the engine; keeps what went in and came out."""

    name, precision, device = "reference", "fp32", "cpu"

    def __init__(self, changed: Iterable[str], reference: Engine, engine: Engine) -> None:
        self.changed, self.reference, self.engine = set(changed), reference, engine
        self.seen: dict[str, tuple[Arrays, Arrays]] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        runner = self.reference if graph in self.changed else self.engine
        came = {key: value.copy() for key, value in inputs.items()}
        outputs = {key: value.copy() for key, value in runner.run(graph, came).items()}
        self.seen[graph] = (came, outputs)
        return outputs


class _Remembering:
    """The engine, which does not run a graph again on inputs that it had."""

    name, precision, device = "remembering", "fp32", "cpu"

    def __init__(self, engine: Engine, seen: dict[str, tuple[Arrays, Arrays]]) -> None:
        self.engine, self.seen = engine, seen

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if graph in self.seen:
            had, outputs = self.seen[graph]
            if all(np.array_equal(had[key], value) for key, value in inputs.items()):
                return outputs
        return self.engine.run(graph, inputs)


def measure(bundle: Bundle, engine: Engine, reference: Engine, changed: Iterable[str]) -> Gate:
    """Compares a bundle on an engine with torch where it changed.

    Args:
        reference: torch with the new weights (TorchEngine).
        changed: names of the graphs that are not the ones that passed before.
    """
    mixed = _Mixed(changed, reference, engine)
    wanted = _clip(bundle, mixed)
    for graph in sorted(mixed.changed - mixed.seen.keys()):  # a clip does not encode
        mixed.run(graph, _random(bundle, graph))
    errors, own = {}, {name: seen for name, seen in mixed.seen.items() if name not in mixed.changed}
    for graph in sorted(mixed.changed):
        inputs, outputs = mixed.seen[graph]
        got = {key: value.copy() for key, value in engine.run(graph, inputs).items()}
        errors[graph] = max(parity.relative_error(got[k], outputs[k]) for k in outputs)
        own[graph] = (inputs, got)
    return Gate(errors, parity.psnr(_clip(bundle, _Remembering(engine, own)), wanted))


def _clip(bundle: Bundle, engine: Any) -> NDArray[np.uint8]:
    """A clip of the fewest steps there are, under all conditions."""
    generator = Generator(bundle, engine)
    steps = min(count for _, count in bundle.samplers())
    conditions = parity.beating_ring(bundle.manifest.frames, bundle.manifest.size)
    return generator(conditions, steps=steps, seed=SEED).frames


def _random(bundle: Bundle, graph: str) -> Arrays:
    """Fixed numbers in [0, 1) for a graph's inputs."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    inputs = bundle.manifest.graphs[graph].inputs
    return {spec.name: rng.random(spec.shape).astype(spec.dtype) for spec in inputs}
