"""The parity gate of new weights: the graphs that changed, against torch.

A full export compares all graphs and a clip of 4 steps (build.py). Here the graphs are the ones
that passed then, with other numbers in them, so one pass goes through them in a clip's order under
all seven conditions, the changed ones in torch and the others on the engine; then the engine runs
each changed graph on what torch had. A model call is the dear part (half a minute for `base` on two
cores): one in torch, one on the engine, and none where `denoise` did not change.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_export import parity
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays, Engine
from heartbeat_fast.generator import Generator
from heartbeat_fast.sampler import choose
from heartbeat_fast.stopwatch import Stopwatch

SEED = 1


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


def measure(
    bundle: Bundle, engine: Engine, reference: Engine, changed: Iterable[str]
) -> dict[str, float]:
    """How far a bundle on an engine is from torch, where it changed: relative L2 by graph.

    Args:
        reference: torch with the new weights (TorchEngine).
        changed: names of the graphs that are not the ones that passed before.
    """
    mixed = _Mixed(changed, reference, engine)
    _pass(bundle, mixed)
    errors = {}
    for graph in sorted(mixed.changed):
        if graph not in mixed.seen:  # a clip does not encode
            mixed.run(graph, _random(bundle, graph))
        inputs, wanted = mixed.seen[graph]
        got = engine.run(graph, inputs)
        errors[graph] = max(parity.relative_error(got[key], wanted[key]) for key in wanted)
    return errors


def _pass(bundle: Bundle, mixed: _Mixed) -> None:
    """Conditions to one model call to frames, as far as anything changed."""
    generator = Generator(bundle, mixed)  # type: ignore[arg-type]  # of an Engine, what a clip uses
    encoded = generator.encode(parity.beating_ring(bundle.manifest.frames, bundle.manifest.size))
    z = generator.noise(SEED)
    if mixed.changed & {"time", "denoise"}:
        model = generator.model(choose(bundle.samplers(), None, None), 1.0, Stopwatch())
        z = model(z, 0, encoded)
    if "decode" in mixed.changed:
        generator.decode(z, None, SEED, Stopwatch())


def _random(bundle: Bundle, graph: str) -> Arrays:
    """Fixed numbers in [0, 1) for a graph's inputs."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    inputs = bundle.manifest.graphs[graph].inputs
    return {spec.name: rng.random(spec.shape).astype(spec.dtype) for spec in inputs}
