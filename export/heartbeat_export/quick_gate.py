"""The parity gate of new weights: the graphs that changed, against torch, and one clip.

A full export compares all graphs and a clip of 4 steps (build.py). Here the graphs are the ones
that passed then, with other numbers in them, so torch makes one clip of the fewest steps through
those that changed, the engine makes it too, and each changed graph's outputs are compared on the
way. Errors of the graphs before are in that figure; a graph that exceeds the bound runs once more,
on torch's own inputs, and that figure counts. Graphs that did not change run on the engine on both
sides, and never twice on the same inputs.
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
    """The engine; an unchanged graph does not run again on inputs that it had."""

    name, precision, device = "remembering", "fp32", "cpu"

    def __init__(self, engine: Engine, had: dict[str, tuple[Arrays, Arrays]]) -> None:
        self.engine, self.had, self.outputs = engine, had, dict[str, Arrays]()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        if graph in self.had:
            came, outputs = self.had[graph]
            if all(np.array_equal(came[key], value) for key, value in inputs.items()):
                return outputs
        outputs = {key: value.copy() for key, value in self.engine.run(graph, inputs).items()}
        self.outputs[graph] = outputs
        return outputs


def measure(bundle: Bundle, engine: Engine, reference: Engine, changed: Iterable[str]) -> Gate:
    """Compares a bundle on an engine with torch where it changed.

    Args:
        reference: torch with the new weights (TorchEngine).
        changed: names of the graphs that are not the ones that passed before.
    """
    mixed, steps = _Mixed(changed, reference, engine), min(n for _, n in bundle.samplers())
    wanted = _clip(bundle, mixed, steps)
    own = _Remembering(engine, {k: v for k, v in mixed.seen.items() if k not in mixed.changed})
    got = _clip(bundle, own, steps)
    errors, bound = {}, parity.bounds(bundle.manifest.precision).error
    for graph in sorted(mixed.changed):
        if graph not in mixed.seen:  # a clip does not encode
            mixed.run(graph, _random(bundle, graph))
        inputs, outputs = mixed.seen[graph]
        if graph not in own.outputs or _error(own.outputs[graph], outputs) > bound:
            own.run(graph, inputs)
        errors[graph] = _error(own.outputs[graph], outputs)
    return Gate(errors, parity.psnr(got, wanted))


def _error(got: Arrays, wanted: Arrays) -> float:
    return max(parity.relative_error(got[key], wanted[key]) for key in wanted)


def _clip(bundle: Bundle, engine: Any, steps: int) -> NDArray[np.uint8]:
    """A clip under all conditions."""
    conditions = parity.beating_ring(bundle.manifest.frames, bundle.manifest.size)
    return Generator(bundle, engine)(conditions, steps=steps, seed=SEED).frames


def _random(bundle: Bundle, graph: str) -> Arrays:
    """Fixed numbers in [0, 1) for a graph's inputs."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    inputs = bundle.manifest.graphs[graph].inputs
    return {spec.name: rng.random(spec.shape).astype(spec.dtype) for spec in inputs}
