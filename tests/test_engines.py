"""Engines: the same numbers from each, and clear words where one cannot run."""

import warnings

import numpy as np
import pytest

from heartbeat_export.parity import MAX_ERROR, MIN_PSNR, beating_ring, psnr, relative_error
from heartbeat_fast.bundle import GRAPHS, Bundle
from heartbeat_fast.engines import base
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.graphs import Tensors, example_inputs
from heartbeat_fast.models.heartbeat import HeartBeat


@pytest.fixture(scope="module")
def engines(nano_bundle: Bundle, nano_model: HeartBeat) -> tuple[base.Engine, base.Engine]:
    return OnnxRuntimeEngine.open(nano_bundle), TorchEngine(nano_model, nano_bundle)


@pytest.fixture(scope="module")
def inputs(nano_model: HeartBeat) -> dict[str, Tensors]:
    return example_inputs(nano_model, seed=5)  # not the seed the export measured itself on


@pytest.mark.parametrize("graph", GRAPHS)
def test_onnxruntime_equals_torch(
    graph: str, engines: tuple[base.Engine, base.Engine], inputs: dict[str, Tensors]
) -> None:
    arrays = {name: tensor.numpy() for name, tensor in inputs[graph].items()}
    got, wanted = (engine.run(graph, arrays) for engine in engines)
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].std() > 0
        assert relative_error(got[name], wanted[name]) <= MAX_ERROR


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_clips_are_equal(
    guidance: float, nano_bundle: Bundle, engines: tuple[base.Engine, base.Engine]
) -> None:
    ring = beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    clips = [Generator(nano_bundle, e)(ring, steps=6, guidance=guidance, seed=3) for e in engines]
    assert clips[0].frames.std() > 5  # a grey field would pass anything
    assert psnr(clips[0].frames, clips[1].frames) >= MIN_PSNR


def test_inputs_are_checked_before_they_run(engines: tuple[base.Engine, base.Engine]) -> None:
    t = np.zeros(1, np.float32)
    for engine in engines:
        with pytest.raises(EngineError, match="graph time: input t is missing"):
            engine.run("time", {})
        with pytest.raises(EngineError, match="graph time: input x is unknown"):
            engine.run("time", {"t": t, "x": t})
        with pytest.raises(EngineError, match=r"is float32 \(2,\); wanted float32 \(1,\)"):
            engine.run("time", {"t": np.zeros(2, np.float32)})
        with pytest.raises(EngineError, match=r"is float64 \(1,\); wanted float32"):
            engine.run("time", {"t": np.zeros(1)})
        with pytest.raises(EngineError, match="graph: 'upsample' came; the bundle has text, image"):
            engine.run("upsample", {})


def test_unknown_engine_and_device_list_the_known(nano_bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="'warp' came; wanted auto, onnxruntime, torch"):
        base.open_engine("warp", nano_bundle)
    with pytest.raises(EngineError, match=r"device: 'abacus' came; onnxruntime has .*cpu"):
        base.open_engine("onnxruntime", nano_bundle, "abacus")
    with pytest.raises(EngineError, match="torch:FOLDER"):
        base.open_engine("torch", nano_bundle)


def test_a_fallback_is_said_aloud(nano_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchEngine, "available", staticmethod(lambda: (False, "no such library")))
    monkeypatch.setattr(base, "AUTO", ("torch", "onnxruntime"))
    with pytest.warns(UserWarning, match="torch cannot run here: no such library: using onnx"):
        assert base.open_engine("auto", nano_bundle).name == "onnxruntime"
    with pytest.raises(EngineError, match="engine torch cannot run here: no such library"):
        base.open_engine("torch:folder", nano_bundle)


def test_auto_is_silent_where_nothing_falls_back(nano_bundle: Bundle) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert base.open_engine("auto", nano_bundle).name == "onnxruntime"
