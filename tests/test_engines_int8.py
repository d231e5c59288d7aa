"""int8 for OpenVINO: calibrated, gated, found by the engine, of these weights and no others."""

from pathlib import Path

import numpy as np
import pytest

from heartbeat_export import quantise as int8
from heartbeat_export.errors import ExportError
from heartbeat_export.parity import beating_ring, psnr, relative_error
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.openvino_engine import QUANTISED, OpenVinoEngine, quantised_facts
from heartbeat_fast.generator import Generator

pytest.importorskip("nncf", reason="needs the extra quantise")
if "int8" not in OpenVinoEngine.precisions():
    pytest.skip("OpenVINO has no int8 on this processor", allow_module_level=True)


@pytest.fixture(scope="module")
def made(
    nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EngineCache, dict[str, object]]:
    """The nano bundle in int8. Its random weights spread values wider than trained ones do, so the
    gate stands lower here."""
    cache = EngineCache(tmp_path_factory.mktemp("private") / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "MIN_PSNR", 20.0)
        return cache, int8.quantise(nano_bundle, cache=cache, steps=4)


def test_int8_clips_are_near_and_not_the_same(
    nano_bundle: Bundle, made: tuple[EngineCache, dict[str, object]]
) -> None:
    cache, figures = made
    engine, exact = (
        OpenVinoEngine(nano_bundle, precision=precision, cache=cache)
        for precision in ("int8", "fp32")
    )
    assert (engine.name, engine.precision) == ("openvino", "int8")
    ring = beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    got, wanted = (Generator(nano_bundle, e)(ring, steps=4, seed=3).frames for e in (engine, exact))
    assert 20 <= psnr(got, wanted) < 99  # 99: nothing was quantised
    layers = figures["layers"]
    assert isinstance(layers, dict)
    assert all(layers[graph] > 4 for graph in QUANTISED)


def test_every_graph_in_int8(
    nano_bundle: Bundle, made: tuple[EngineCache, dict[str, object]]
) -> None:
    chance = np.random.default_rng(0)
    engine, exact = (
        OpenVinoEngine(nano_bundle, precision=precision, cache=made[0])
        for precision in ("int8", "fp32")
    )
    for graph in QUANTISED:
        specs = nano_bundle.manifest.graphs[graph].inputs
        inputs = {spec.name: chance.standard_normal(spec.shape, np.float32) for spec in specs}
        got, wanted = engine.run(graph, inputs), exact.run(graph, inputs)
        for name in wanted:
            assert 1e-4 < relative_error(got[name], wanted[name]) < 0.2


def test_what_fails_the_gate_is_not_kept(
    nano_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "MIN_PSNR", 98.0)
    monkeypatch.setattr(int8, "CALIBRATION", {900_001: None})
    monkeypatch.setattr(int8, "HELD_OUT", {900_101: None})
    cache = EngineCache(tmp_path / "cache")
    with pytest.raises(ExportError, match=r"int8: held-out clips at .*stay with bf16 or fp32"):
        int8.quantise(nano_bundle, cache=cache, steps=4)
    assert all(cache.get(quantised_facts(nano_bundle, graph)) is None for graph in QUANTISED)


def test_int8_of_other_weights_is_not_served(nano_bundle: Bundle) -> None:
    graphs = nano_bundle.manifest.graphs
    facts = {graph: quantised_facts(nano_bundle, graph) for graph in QUANTISED}
    assert [facts[graph]["graph"] for graph in QUANTISED] == [graphs[g].sha256 for g in QUANTISED]
