"""Engines: the same numbers from each, and clear words where one cannot run."""

from collections.abc import Callable

import numpy as np
import pytest

from heartbeat_export.parity import MIN_PSNR, beating_ring, psnr, relative_error
from heartbeat_fast.bundle import GRAPHS, Bundle
from heartbeat_fast.engines import base
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.engines.openvino_engine import OpenVinoEngine
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.graphs import Tensors, example_inputs
from heartbeat_fast.models.heartbeat import HeartBeat

Opened = Callable[[str], base.Engine]
# Largest relative L2 error of a graph against torch, and least PSNR of a clip in dB. Seen on nano:
# fp32 2e-6 and 99 dB, bf16 6e-3 and 51 dB.
BOUNDS = {"onnxruntime": (1e-3, MIN_PSNR), "openvino:fp32": (1e-3, MIN_PSNR)}
BOUNDS |= {"openvino:bf16": (2e-2, 35.0)}


@pytest.fixture(scope="module")
def opened(nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """An engine by choice, opened once."""
    cache = EngineCache(tmp_path_factory.mktemp("private") / "cache")
    known: dict[str, base.Engine] = {"onnxruntime": OnnxRuntimeEngine.open(nano_bundle)}

    def engine(choice: str) -> base.Engine:
        if choice not in known:
            precision = choice.partition(":")[2]
            if precision not in OpenVinoEngine.precisions():
                pytest.skip(f"openvino has no {precision} on this processor")
            known[choice] = OpenVinoEngine(nano_bundle, precision=precision, cache=cache)
        return known[choice]

    return engine


@pytest.fixture(scope="module")
def reference(nano_bundle: Bundle, nano_model: HeartBeat) -> TorchEngine:
    return TorchEngine(nano_model, nano_bundle)


@pytest.fixture(scope="module")
def inputs(nano_model: HeartBeat) -> dict[str, Tensors]:
    return example_inputs(nano_model, seed=5)  # not the seed the export measured itself on


@pytest.mark.parametrize("choice", BOUNDS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_equals_torch(
    graph: str, choice: str, opened: Opened, reference: TorchEngine, inputs: dict[str, Tensors]
) -> None:
    arrays = {name: tensor.numpy() for name, tensor in inputs[graph].items()}
    got, wanted = (engine.run(graph, arrays) for engine in (opened(choice), reference))
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert wanted[name].std() > 0
        assert relative_error(got[name], wanted[name]) <= BOUNDS[choice][0]


@pytest.mark.parametrize("choice", BOUNDS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_clips_equal_torchs(
    guidance: float, choice: str, nano_bundle: Bundle, opened: Opened, reference: TorchEngine
) -> None:
    ring = beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    got, wanted = (
        Generator(nano_bundle, engine)(ring, steps=6, guidance=guidance, seed=3).frames
        for engine in (opened(choice), reference)
    )
    assert wanted.std() > 5  # a grey field would pass anything
    assert psnr(got, wanted) >= BOUNDS[choice][1]


@pytest.mark.parametrize("choice", BOUNDS)
def test_same_seed_same_engine_same_clip(choice: str, nano_bundle: Bundle, opened: Opened) -> None:
    ring = beating_ring(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    make = Generator(nano_bundle, opened(choice))
    first = make(ring, steps=4, seed=3).frames
    make(ring, steps=4, seed=4)  # another clip between must leave no trace
    assert np.array_equal(make(ring, steps=4, seed=3).frames, first)


def test_inputs_are_checked_before_they_run(opened: Opened, reference: TorchEngine) -> None:
    t = np.zeros(1, np.float32)
    for engine in (opened("onnxruntime"), opened("openvino:fp32"), reference):
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


def test_unknown_engine_device_and_precision_list_the_known(nano_bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="'warp' came; wanted auto, openvino, onnxruntime, torch"):
        base.open_engine("warp", nano_bundle)
    with pytest.raises(EngineError, match=r"device: 'abacus' came; onnxruntime has .*cpu"):
        base.open_engine("onnxruntime", nano_bundle, "abacus")
    with pytest.raises(EngineError, match=r"device: 'abacus' came; openvino sees .*cpu"):
        base.open_engine("openvino", nano_bundle, "abacus")
    with pytest.raises(EngineError, match=r"precision 'fp4' came; cpu has .*fp32"):
        base.open_engine("openvino:fp4", nano_bundle)
    with pytest.raises(EngineError, match="torch:FOLDER"):
        base.open_engine("torch", nano_bundle)
