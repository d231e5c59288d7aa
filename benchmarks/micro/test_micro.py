"""Micro-benchmarks: what the runtime adds around the networks, on the embedded bundle.

    python -m pytest benchmarks/micro --benchmark-only

Each checks what it timed: a figure for a wrong result is worth nothing.
"""

from typing import Any

import numpy as np
import pytest

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.sampler import SamplerTable, pick, sample
from heartbeat_fast.speckle import texture
from heartbeat_training.phantom import record

pytest.importorskip("pytest_benchmark")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open()


@pytest.fixture(scope="module")
def heart(bundle: Bundle) -> Conditions:
    manifest = bundle.manifest
    return record(1, frames=manifest.frames, size=manifest.size).conditions(NAMES)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "ddim"])
@pytest.mark.parametrize("steps", [4, 20])
def test_sampler_arithmetic(benchmark: Any, bundle: Bundle, name: str, steps: int) -> None:
    """A table's weighted sums over a clip's latents; the model's output is the latents."""
    table: SamplerTable = pick(bundle.samplers(), name, steps)
    shape = (1, bundle.manifest.frames, *bundle.manifest.latent)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    out = benchmark(lambda: sample(table, lambda z, i: z, noise))
    assert out.shape == shape
    assert np.isfinite(out).all()


def test_texture(benchmark: Any, bundle: Bundle, heart: Conditions) -> None:
    """Speckle's noise carried along the flow."""
    manifest = bundle.manifest
    field = benchmark(lambda: texture(heart.flow, manifest.frames, manifest.size, 1))
    assert field.shape == (manifest.frames, 2, manifest.size, manifest.size)
    assert 0.8 < field.std() < 1.2


def test_conditions_checks(benchmark: Any, heart: Conditions) -> None:
    """Shapes, ranges and labels of all seven, as a host hands them over."""
    given = {name: getattr(heart, name) for name in NAMES}
    made = benchmark(lambda: Conditions(**given, frames=heart.frames, size=heart.size))
    assert made.present == NAMES


def test_conditions_as_arrays(benchmark: Any, heart: Conditions) -> None:
    """One-hot masks and flags, as the graphs take them."""
    arrays = benchmark(heart.arrays)
    assert arrays["mask"].shape[2] == 4


def test_bundle_open(benchmark: Any) -> None:
    """Manifest read and checked; no graph is read."""
    assert benchmark(Bundle.open).manifest.graphs


def test_samplers_open(benchmark: Any, bundle: Bundle) -> None:
    """samplers.json hashed, parsed and checked."""
    assert ("dpmpp_2m", 10) in benchmark(bundle.samplers)
