"""TensorRT's own road, on stand-ins for it (test_tensorrt_rtx.py builds for real).

What the stand-ins show: which calls are made, with which flags, in which order; that nothing
removed is used; that memory, recordings and refits are kept apart. What they cannot show: that
TensorRT accepts the graphs, how fast it is, how far from torch.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from heartbeat_export import tensorrt_builder
from heartbeat_export.errors import ExportError
from heartbeat_export.parity import beating_ring
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import cuda
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.engines.tensorrt_engine import TensorRtEngine
from heartbeat_fast.engines.tensorrt_plan import TENSORRT, Recipe, build, facts
from heartbeat_fast.engines.tensorrt_rtx_engine import PORTABLE, TensorRtRtxEngine
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator
from tests.fake_cuda import Driver
from tests.fake_tensorrt import API, stand_in

VERSIONS = ["10.14.1.48", "11.4.0.106"]
Install = Callable[..., Driver]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(version, gpus=…, capability=…): puts stand-ins in place."""

    def put(version: str, **hardware: Any) -> Driver:
        return stand_in(monkeypatch, version, **hardware)[0]

    return put


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def ends(bundle: Bundle, graph: str, seed: int = 0) -> dict[str, Any]:
    """Random inputs of a graph."""
    chance = np.random.default_rng(seed)
    given: dict[str, Any] = {}
    for spec in bundle.manifest.graphs[graph].inputs:
        whole = spec.dtype == "int64"
        given[spec.name] = (
            chance.integers(1, 90, spec.shape)
            if whole
            else chance.standard_normal(spec.shape).astype(np.float32)
        )
    return given


@pytest.mark.parametrize("version", VERSIONS)
def test_a_network_is_strongly_typed_and_exact(
    version: str, install: Install, nano_bundle: Bundle
) -> None:
    install(version)
    spec = nano_bundle.manifest.graphs["time"]
    plan = build(TENSORRT, nano_bundle.read(spec), Recipe())
    (built,) = sys.modules["tensorrt"].built  # type: ignore[attr-defined]
    typed = sys.modules["tensorrt"].NetworkDefinitionCreationFlag.STRONGLY_TYPED  # type: ignore[attr-defined]
    assert built == {"flags": set(), "targets": [], "network": 1 << int(typed)}
    assert plan.startswith(b"PLAN")
    build(TENSORRT, nano_bundle.read(spec), Recipe(refit=True, tf32=True))
    assert sys.modules["tensorrt"].built[1]["flags"] == {"REFIT", "STRIP_PLAN", "TF32"}  # type: ignore[attr-defined]


def test_the_stand_in_refuses_what_was_removed(install: Install) -> None:
    """Or the tests above would show nothing."""
    install("11.4.0.106")
    trt: Any = sys.modules["tensorrt"]
    with pytest.raises(AttributeError, match="FP16"):
        _ = trt.BuilderFlag.FP16
    config = trt.Builder(None).create_builder_config()
    for name in ("int8_calibrator", "set_calibration_profile", "num_compute_capabilities"):
        with pytest.raises(AttributeError, match=name):
            getattr(config, name)
        with pytest.raises(AttributeError, match=name):
            setattr(config, name, None)
    assert "precision" in API["10.14.1.48"]["ILayer"].split()
    assert "precision" not in API["11.4.0.106"]["ILayer"].split()


@pytest.mark.parametrize(
    ("recipe", "version", "gpus", "message"),
    [
        (Recipe(), "11.4.0.106", 0, "no GPU here to build for"),
        (Recipe(refit=True), "11.4.0.106", 0, "for refitting needs a GPU"),
        (Recipe(("SM86",)), "11.4.0.106", 1, "for other targets: tensorrt_rtx"),
        (Recipe(("SM99",)), "11.4.0.106", 1, "target SM99 came"),
    ],
)
def test_recipes_that_cannot_be_built(
    recipe: Recipe, version: str, gpus: int, message: str, install: Install
) -> None:
    install(version, gpus=gpus)
    with pytest.raises(EngineError, match=message):
        build(TENSORRT, b"", recipe)


def test_a_version_whose_refit_is_wrong(install: Install) -> None:
    install("11.4.0.106")
    sys.modules["tensorrt"].__version__ = "11.3.0.99"  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=r"11\.3 may drop a bias .* install 11\.4"):
        build(TENSORRT, b"", Recipe(refit=True))
    sys.modules["tensorrt"].__version__ = "10.13.3.9"  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=r"10\.13\.3\.9 is installed; wanted 10\.14 or later"):
        build(TENSORRT, b"", Recipe())


def test_graphs_that_are_refused(install: Install, nano_bundle: Bundle) -> None:
    install("11.4.0.106")
    with pytest.raises(EngineError, match=r"graph time: tensorrt cannot parse it: .+"):
        build(TENSORRT, b"junk", Recipe(), "time")
    model = onnx.load_from_string(nano_bundle.read(nano_bundle.manifest.graphs["time"]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(EngineError, match="t of dynamic shape; wanted static"):
        build(TENSORRT, model.SerializeToString(), Recipe())


def test_nothing_is_said_to_run_where_it_cannot(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("11.4.0.106")
    assert TensorRtEngine.available() == (True, "11.4.0.106: Stand-in GPU (SM90)")
    install("11.4.0.106", gpus=0)
    assert TensorRtEngine.available()[0] is False
    install("rtx 1.7.1.116")
    can, why = TensorRtRtxEngine.available()
    assert not can
    assert "Stand-in GPU is SM90" in why
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    can, why = TensorRtEngine.available()
    assert not can
    assert "heartbeat_fast[tensorrt]" in why


def engines(install: Install, bundle: Bundle, cache: EngineCache) -> Iterator[tuple[Any, Driver]]:
    """Each engine on its stand-in."""
    for version in VERSIONS:
        driver = install(version)
        yield TensorRtEngine(bundle, "cuda", cache), driver
    driver = install("rtx 1.7.1.116", capability=(8, 9))
    yield TensorRtRtxEngine(bundle, "auto", cache), driver


def test_every_graph_as_onnxruntime_has_it(
    install: Install, nano_bundle: Bundle, cache: EngineCache
) -> None:
    reference = OnnxRuntimeEngine.open(nano_bundle)
    for engine, driver in engines(install, nano_bundle, cache):
        for graph in nano_bundle.manifest.graphs:
            for seed in range(3):  # the second run of denoise is recorded, the third replayed
                inputs = ends(nano_bundle, graph, seed)
                got, wanted = engine.run(graph, inputs), reference.run(graph, inputs)
                for name in wanted:
                    np.testing.assert_allclose(got[name], wanted[name], rtol=1e-4, atol=1e-5)
        replayed = driver.calls.count("cuGraphLaunch")
        assert replayed == (0 if engine.name == "tensorrt_rtx" else 2)


def test_a_clip_as_onnxruntime_makes_it(
    install: Install, nano_bundle: Bundle, cache: EngineCache
) -> None:
    manifest = nano_bundle.manifest
    conditions = beating_ring(manifest.frames, manifest.size)
    wanted = Generator.open(nano_bundle, "onnxruntime")(conditions, steps=4, guidance=2.0)
    for engine, driver in engines(install, nano_bundle, cache):
        generator = Generator(nano_bundle, engine)
        for _ in range(2):
            got = generator(conditions, steps=4, guidance=2.0)
            assert np.abs(got.frames.astype(int) - wanted.frames).max() <= 1
        assert driver.capturing is None


def test_what_is_kept_stays_on_the_device(
    install: Install, nano_bundle: Bundle, cache: EngineCache
) -> None:
    driver = install("11.4.0.106")
    engine = TensorRtEngine(nano_bundle, "cuda:0", cache)
    reference = OnnxRuntimeEngine.open(nano_bundle)
    tokens = {name: ends(nano_bundle, "context", seed) for seed, name in enumerate("ab")}
    kept = {name: engine.keep("context", tokens[name]) for name in "ab"}
    inputs = ends(nano_bundle, "denoise")
    for name in "abab":  # two condition sets in turn, as guidance has them
        before = driver.uploaded
        got = engine.run("denoise", {**inputs, **kept[name]})["out"]
        own = [v for k, v in inputs.items() if k not in kept[name]]
        assert driver.uploaded - before == sum(v.nbytes for v in own)
        context = reference.run("context", tokens[name])
        wanted = reference.run("denoise", {**inputs, **context})["out"]
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    assert driver.calls.count("cuGraphInstantiateWithFlags") == 2
    # A later clip finds the memory of an earlier one, so its recording fits.
    addresses = {t.buffer.address for t in kept["a"].values()}
    del kept["a"]
    again = engine.keep("context", tokens["a"])
    assert {t.buffer.address for t in again.values()} == addresses
    engine.run("denoise", {**inputs, **again})
    assert driver.calls.count("cuGraphInstantiateWithFlags") == 2


def test_recordings_are_few_and_memory_is_given_back(
    install: Install, nano_bundle: Bundle, cache: EngineCache
) -> None:
    driver = install("11.4.0.106")
    engine = TensorRtEngine(nano_bundle, "cuda", cache)
    inputs, tokens = ends(nano_bundle, "denoise"), ends(nano_bundle, "context")
    kept = [engine.keep("context", tokens) for _ in range(12)]
    for one in kept:
        engine.run("denoise", {**inputs, **one})
    assert len(engine._loaded["denoise"].recordings) == 8
    del one, kept
    count = len(driver.memory)
    for _ in range(20):
        engine.run("denoise", {**inputs, **engine.keep("context", tokens)})
    assert len(driver.memory) == count
    del engine
    import gc

    gc.collect()
    assert driver.memory == {}


def test_working_memory_is_one_block(
    install: Install, nano_bundle: Bundle, cache: EngineCache
) -> None:
    """It grows with the largest graph, and recordings of the smaller block go with it."""
    driver = install("11.4.0.106")
    engine = TensorRtEngine(nano_bundle, "cuda", cache)
    inputs = ends(nano_bundle, "denoise")
    first = [engine.run("denoise", inputs)["out"] for _ in range(3)][-1]
    for graph in nano_bundle.manifest.graphs:
        engine.run(graph, ends(nano_bundle, graph))
    sizes = {loaded.context._memory for loaded in engine._loaded.values()}
    assert len(sizes) == 1
    np.testing.assert_array_equal(engine.run("denoise", inputs)["out"], first)
    assert driver.capturing is None


def test_plans_are_found_again(install: Install, nano_bundle: Bundle, cache: EngineCache) -> None:
    install("11.4.0.106")
    for _ in range(2):
        TensorRtEngine(nano_bundle, "cuda", cache).run("time", ends(nano_bundle, "time"))
    assert len(sys.modules["tensorrt"].built) == 1  # type: ignore[attr-defined]
    graph = nano_bundle.manifest.graphs["time"].sha256
    here = cuda.Gpu.find("cuda")
    key = facts(TENSORRT, graph, Recipe(), here)
    for other in (
        facts(TENSORRT, "0" * 64, Recipe(), here),
        facts(TENSORRT, graph, Recipe(refit=True), here),
        facts(TENSORRT, graph, Recipe(tf32=True), here),
        facts(TENSORRT, graph, Recipe(), cuda.Gpu(0, "another", here.target, here.driver)),
        facts(TENSORRT, graph, Recipe(), cuda.Gpu(0, here.name, here.target, 1)),
    ):
        assert cache.path(other) != cache.path(key)
    install("10.14.1.48")
    assert facts(TENSORRT, graph, Recipe(), here) != key


def test_a_plan_of_something_else_is_not_run(
    install: Install, nano_bundle: Bundle, cache: EngineCache
) -> None:
    install("11.4.0.106")
    engine = TensorRtEngine(nano_bundle, "cuda", cache)
    graphs = nano_bundle.manifest.graphs
    other = build(TENSORRT, nano_bundle.read(graphs["encode"]), Recipe())
    cache.put(facts(TENSORRT, graphs["time"].sha256, Recipe(), engine.gpu), other)
    with pytest.raises(EngineError, match="graph time: its plan has frames"):
        engine.run("time", ends(nano_bundle, "time"))
    cache.put(facts(TENSORRT, graphs["time"].sha256, Recipe(), engine.gpu), b"junk")
    with pytest.raises(EngineError, match="graph time: tensorrt cannot load it: magic tag"):
        engine.run("time", ends(nano_bundle, "time"))


def test_opening(install: Install, nano_bundle: Bundle) -> None:
    install("11.4.0.106")
    assert TensorRtEngine.open(nano_bundle, "cuda:0").device == "cuda:0"
    for device in ("cpu", "cuda:1", "cuda:x"):
        with pytest.raises(EngineError, match="wanted cuda or cuda:N, 1 GPUs here"):
            TensorRtEngine.open(nano_bundle, device)
    with pytest.raises(EngineError, match="'bf16' came after the colon"):
        TensorRtEngine.open(nano_bundle, "cuda", "bf16")


def test_compiled_kernels_are_kept(
    install: Install, nano_bundle: Bundle, cache: EngineCache
) -> None:
    """TensorRT-RTX compiles when a context first runs: once a GPU and driver, not once a start."""
    install("rtx 1.7.1.116", capability=(8, 6))
    for expected in (b"", b"compiled"):
        engine = TensorRtRtxEngine(nano_bundle, "cuda", cache)
        engine.run("denoise", ends(nano_bundle, "denoise"))
        config = engine._loaded["denoise"].context.get_runtime_config()
        assert config.get_runtime_cache()._content == expected
        assert config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    labels = sorted(entry.label for entry in cache.entries())
    assert labels == ["denoise compiled for Stand-in GPU", "nano denoise"]
    assert sys.modules["tensorrt_rtx"].built[0]["targets"] == list(PORTABLE.targets)  # type: ignore[attr-defined]


# Refit


def weights_of(proto: onnx.ModelProto) -> list[str]:
    """The names of what a plan can take anew."""
    return [
        t.name for t in proto.graph.initializer if t.data_type in (1, 10) and np.prod(t.dims) > 1
    ]


@pytest.fixture
def two(nano_bundle: Bundle) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """One graph with two sets of weights."""
    first = onnx.load_from_string(nano_bundle.read(nano_bundle.manifest.graphs["time"]))
    second = onnx.ModelProto()
    second.CopyFrom(first)
    for tensor in second.graph.initializer:
        if tensor.name in weights_of(first):
            array = onnx.numpy_helper.to_array(tensor) * np.float16(0.5)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return first, second


@pytest.mark.parametrize("version", VERSIONS)
def test_a_refit_is_the_plan_of_the_new_weights(
    version: str, install: Install, two: tuple[onnx.ModelProto, onnx.ModelProto]
) -> None:
    install(version)
    a, b = two
    master = build(TENSORRT, a.SerializeToString(), Recipe(refit=True))
    plans = [tensorrt_builder.refit(TENSORRT, master, p, weights_of(p)) for p in (a, b, a)]
    assert plans[0] == plans[2] != plans[1]
    run = []
    for proto in two:
        direct = build(TENSORRT, proto.SerializeToString(), Recipe()).partition(b"\n")[2]
        run.append(onnx.load_from_string(direct).graph.initializer)
    for plan, direct in zip(plans, run, strict=False):
        refitted = onnx.load_from_string(plan.partition(b"\n")[2]).graph.initializer
        for got, wanted in zip(refitted, direct, strict=True):
            np.testing.assert_array_equal(
                onnx.numpy_helper.to_array(got), onnx.numpy_helper.to_array(wanted)
            )


def test_refits_that_would_be_wrong(
    install: Install, two: tuple[onnx.ModelProto, onnx.ModelProto]
) -> None:
    install("11.4.0.106")
    a, b = two
    names = weights_of(a)
    master = build(TENSORRT, a.SerializeToString(), Recipe(refit=True))

    def refused(proto: onnx.ModelProto, weights: list[str], message: str) -> None:
        with pytest.raises(ExportError, match=message):
            tensorrt_builder.refit(TENSORRT, master, proto, weights, "time")

    refused(b, [*names, "scale"], "1 weights folded into constants, .* anew: scale")
    lacking, shorter = onnx.ModelProto(), onnx.ModelProto()
    lacking.CopyFrom(b)
    del lacking.graph.initializer[:]
    refused(lacking, [], rf"{len(names)} weights wanted by the plan and not in the graph")
    shorter.CopyFrom(b)
    tensor = next(t for t in shorter.graph.initializer if t.name == names[0])
    short = onnx.numpy_helper.to_array(tensor).reshape(-1)[:-1]
    tensor.CopyFrom(onnx.numpy_helper.from_array(short.copy(), tensor.name))
    refused(shorter, names, f"1 weights of another shape or type .*: {names[0]}")
    plain = build(TENSORRT, a.SerializeToString(), Recipe())
    with pytest.raises(ExportError, match="not built for refitting"):
        tensorrt_builder.refit(TENSORRT, plain, b, names)
    install("11.4.0.106", gpus=0)
    with pytest.raises(EngineError, match="needs a GPU"):
        tensorrt_builder.refit(TENSORRT, master, b, names)


def test_builds_are_counted_once(install: Install, nano_bundle: Bundle, cache: EngineCache) -> None:
    install("11.4.0.106")
    said: list[str] = []
    for cached in (False, True):
        (built,) = tensorrt_builder.build_all(
            TENSORRT, nano_bundle, [Recipe()], ["time"], cache, say=said.append
        )
        assert (built.graph, built.cached) == ("time", cached)
    assert said == ["time"]
    with pytest.raises(ExportError, match="graph: 'nothing' came"):
        list(tensorrt_builder.build_all(TENSORRT, nano_bundle, [Recipe()], ["nothing"], cache))
    # The engine finds what was built ahead.
    TensorRtEngine(nano_bundle, "cuda", cache).run("time", ends(nano_bundle, "time"))
    assert len(sys.modules["tensorrt"].built) == 1  # type: ignore[attr-defined]
