"""OpenVINO's own matters: arrays bound in place, its cache, threads, errors in one line."""

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import machine
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.openvino_engine import OpenVinoEngine
from heartbeat_fast.errors import BundleError, EngineError

pytest.importorskip("openvino", reason="needs the extra openvino")

Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def engine(nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> OpenVinoEngine:
    cache = EngineCache(tmp_path_factory.mktemp("private") / "cache")
    return OpenVinoEngine(nano_bundle, precision="fp32", cache=cache)


@pytest.fixture
def inputs(nano_bundle: Bundle) -> Arrays:
    chance = np.random.default_rng(0)
    specs = nano_bundle.manifest.graphs["denoise"].inputs
    return {spec.name: chance.standard_normal(spec.shape, np.float32) for spec in specs}


def test_arrays_are_bound_once_and_changes_in_them_are_seen(
    engine: OpenVinoEngine, inputs: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound: list[str] = []
    bind = engine._bind
    monkeypatch.setattr(
        engine, "_bind", lambda loaded, name, array: (bound.append(name), bind(loaded, name, array))
    )
    first = engine.run("denoise", inputs)["out"]
    assert sorted(bound) == sorted(inputs)
    bound.clear()
    second = engine.run("denoise", inputs | {"z": inputs["z"] * 2})["out"]
    assert bound == ["z"]  # K, V, temb and local stay where they are
    assert not np.array_equal(first, second)
    inputs["local"] *= 3  # in place: the same object, other numbers
    third = engine.run("denoise", inputs)["out"]
    fresh = engine.run("denoise", {name: array.copy() for name, array in inputs.items()})["out"]
    assert np.array_equal(third, fresh)
    assert not np.array_equal(third, first)


def test_read_only_and_strided_arrays_are_copied_each_time(
    engine: OpenVinoEngine, inputs: Arrays
) -> None:
    wanted = engine.run("denoise", inputs)["out"]
    wide = np.zeros((*inputs["z"].shape, 2), np.float32)
    odd = wide[..., 0]  # not contiguous
    odd[...] = inputs["z"]
    owner = inputs["temb"].copy()
    locked = owner.view()
    locked.flags.writeable = False
    mixed = inputs | {"z": odd, "temb": locked}
    assert np.array_equal(engine.run("denoise", mixed)["out"], wanted)
    owner *= 2  # behind the locked view's back
    changed = engine.run("denoise", mixed)["out"]
    assert np.array_equal(changed, engine.run("denoise", inputs | {"temb": owner})["out"])
    assert not np.array_equal(changed, wanted)


def test_results_are_the_callers(engine: OpenVinoEngine, inputs: Arrays) -> None:
    first = engine.run("denoise", inputs)["out"]
    kept = first.copy()
    engine.run("denoise", inputs | {"z": inputs["z"] + 1})
    assert np.array_equal(first, kept)


def test_threads_do_not_mix_their_clips(engine: OpenVinoEngine, inputs: Arrays) -> None:
    mine = [inputs | {"z": inputs["z"] + i} for i in range(4)]
    wanted = [engine.run("denoise", each)["out"] for each in mine]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(5):
            if not np.array_equal(engine.run("denoise", mine[i])["out"], wanted[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_a_compiled_graph_is_kept_and_taken_from_the_cache(
    nano_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = {"t": np.array([500.0], np.float32)}
    cache = EngineCache(tmp_path / "cache")
    first = OpenVinoEngine(nano_bundle, precision="fp32", cache=cache).run("time", t)["temb"]
    assert [entry.label for entry in cache.entries()] == ["time for OpenVINO fp32"]
    again = OpenVinoEngine(nano_bundle, precision="fp32", cache=cache)
    compiled: list[int] = []
    core = again._core

    class Counting:
        def __getattr__(self, name: str) -> Any:
            if name == "compile_model":
                compiled.append(1)
            return getattr(core, name)

    monkeypatch.setattr(again, "_core", Counting())
    assert np.array_equal(again.run("time", t)["temb"], first)
    assert compiled == []


def test_a_damaged_cache_is_built_anew_aloud(nano_bundle: Bundle, tmp_path: Path) -> None:
    t = {"t": np.array([500.0], np.float32)}
    cache = EngineCache(tmp_path / "cache")
    first = OpenVinoEngine(nano_bundle, precision="fp32", cache=cache).run("time", t)["temb"]
    (file,) = (tmp_path / "cache").glob("*.engine")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="altered, or written elsewhere"):
        again = OpenVinoEngine(nano_bundle, precision="fp32", cache=cache).run("time", t)["temb"]
    assert np.array_equal(again, first)


def test_what_openvino_itself_refuses_is_built_anew_aloud(
    nano_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sealed entry that this OpenVINO cannot import, as after a library swapped in place."""
    t = {"t": np.array([500.0], np.float32)}
    engine = OpenVinoEngine(nano_bundle, precision="fp32", cache=EngineCache(tmp_path / "cache"))
    monkeypatch.setattr(engine._cache, "load", lambda facts, build, label: b"not an engine")
    with pytest.warns(UserWarning, match="graph time: openvino refuses its cache"):
        assert engine.run("time", t)["temb"].std() > 0


def test_an_altered_graph_is_refused_before_the_cache_is_asked(
    nano_bundle: Bundle, tmp_path: Path
) -> None:
    copy = tmp_path / "bundle"
    copy.mkdir()
    for file in nano_bundle.path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    cache = EngineCache(tmp_path / "cache")
    t = {"t": np.array([500.0], np.float32)}
    OpenVinoEngine(nano_bundle, precision="fp32", cache=cache).run("time", t)
    graph = bytearray((copy / "time.onnx").read_bytes())
    graph[-1] ^= 1
    (copy / "time.onnx").write_bytes(graph)
    with pytest.raises(BundleError, match="altered"):
        OpenVinoEngine(Bundle.open(copy), precision="fp32", cache=cache).run("time", t)


def test_a_graph_that_cannot_be_read_is_one_line(
    nano_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OpenVinoEngine(nano_bundle, precision="fp32", cache=EngineCache(tmp_path / "cache"))
    monkeypatch.setattr(Bundle, "read", lambda self, spec: b"no onnx at all")
    with pytest.raises(EngineError, match="graph time: openvino cannot load it") as error:
        engine.run("time", {"t": np.zeros(1, np.float32)})
    assert "\n" not in str(error.value)


def test_group_norms_in_one_go_are_the_same_norms(nano_bundle: Bundle) -> None:
    """Every norm of the denoiser is rewritten, and what it puts out stays."""
    import openvino

    from heartbeat_fast.engines.openvino_rewrites import norms_in_one_go

    core, spec = openvino.Core(), nano_bundle.manifest.graphs["denoise"]
    chance = np.random.default_rng(3)
    given = {i.name: chance.standard_normal(i.shape, np.float32) for i in spec.inputs}
    made = []
    for rewritten in (False, True):
        model = core.read_model(nano_bundle.read(spec))
        names = [node.get_type_name() for node in model.get_ops()]
        if rewritten:
            assert norms_in_one_go(model) == names.count("GroupNormalization") > 0
            names = [node.get_type_name() for node in model.get_ops()]
            assert "GroupNormalization" not in names
        exact = {"INFERENCE_PRECISION_HINT": "f32"}
        made.append(core.compile_model(model, "CPU", exact)(given)["out"])
    np.testing.assert_allclose(made[1], made[0], atol=1e-5)


def test_threads_are_pinned_only_on_a_whole_machine(
    nano_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OpenVinoEngine(nano_bundle, precision="fp32")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "_processors", lambda: 4)
    monkeypatch.setattr(machine, "_quota", lambda: 4)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    whole = engine._options("denoise")
    assert (whole["ENABLE_CPU_PINNING"], whole["INFERENCE_NUM_THREADS"]) == (True, 0)
    monkeypatch.setattr(machine, "_quota", lambda: 2)  # a container
    part = engine._options("denoise")
    assert (part["ENABLE_CPU_PINNING"], part["INFERENCE_NUM_THREADS"]) == (False, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    part = engine._options("denoise")
    assert (part["ENABLE_CPU_PINNING"], part["INFERENCE_NUM_THREADS"]) == (False, 3)


def test_time_is_exact_at_every_precision(nano_bundle: Bundle, tmp_path: Path) -> None:
    """Half the sinusoids of t = 500 are lost in bfloat16."""
    if "bf16" not in OpenVinoEngine.precisions():
        pytest.skip("this processor does not compute in bfloat16")
    cache = EngineCache(tmp_path / "cache")
    t = {"t": np.array([500.0], np.float32)}
    exact, half = (
        OpenVinoEngine(nano_bundle, precision=precision, cache=cache).run("time", t)["temb"]
        for precision in ("fp32", "bf16")
    )
    assert np.allclose(exact, half, rtol=1e-5, atol=1e-6)


def test_without_warnings_where_all_is_well(nano_bundle: Bundle, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = OpenVinoEngine(nano_bundle, cache=EngineCache(tmp_path / "cache"))
        engine.run("time", {"t": np.zeros(1, np.float32)})
    assert engine.precision == OpenVinoEngine.precisions()[0]


def test_int8_that_was_not_made_says_how(nano_bundle: Bundle, tmp_path: Path) -> None:
    engine = OpenVinoEngine(nano_bundle, precision="int8", cache=EngineCache(tmp_path / "cache"))
    inputs = {
        spec.name: np.zeros(spec.shape, np.float32)
        for spec in nano_bundle.manifest.graphs["denoise"].inputs
    }
    with pytest.raises(
        EngineError, match=r"no int8 of bundle .*heartbeat-export quantise --bundle"
    ):
        engine.run("denoise", inputs)
