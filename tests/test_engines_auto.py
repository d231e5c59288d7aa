"""`auto`: the first candidate that passes parity, never silently another than the first."""

import warnings
from pathlib import Path

import pytest

from heartbeat_fast.bundle import GRAPHS, Bundle
from heartbeat_fast.engines import auto, base
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.engines.openvino_engine import OpenVinoEngine
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.errors import EngineError

pytest.importorskip("openvino", reason="needs the extra openvino")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """A cache of the test's own; only two graphs are compared, for time's sake."""
    monkeypatch.setenv("HEARTBEAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(auto, "GRAPHS", ("time", "decode"))
    return EngineCache()


def absent(name: str) -> tuple[bool, str]:
    return False, f"no {name} here"


def test_auto_takes_the_fastest_and_is_silent(nano_bundle: Bundle, cache: EngineCache) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = base.open_engine("auto", nano_bundle)
    assert (engine.name, engine.precision) == ("openvino", OpenVinoEngine.precisions()[0])


def test_a_verdict_is_measured_once(
    nano_bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "GRAPHS", GRAPHS)
    base.open_engine("auto", nano_bundle)
    assert any(entry.label.startswith("parity of openvino") for entry in cache.entries())

    def measure(*_: object) -> dict[str, float]:
        raise AssertionError("measured again")

    monkeypatch.setattr(auto, "graph_errors", measure)
    assert base.open_engine("auto", nano_bundle).name == "openvino"


@pytest.mark.parametrize("change", ["weights", "version", "processor"])
def test_a_verdict_is_of_these_weights_versions_and_processor(
    change: str, nano_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = ("openvino:fp32", "cpu", "onnxruntime", nano_bundle)
    before = auto.verdict_facts(*facts)
    assert auto.verdict_facts(*facts) == before
    if change == "weights":
        spec = nano_bundle.manifest.graphs["denoise"]
        other = base.GraphSpec(**{**vars(spec), "sha256": "0" * 64})
        monkeypatch.setitem(nano_bundle.manifest.graphs, "denoise", other)
    elif change == "version":
        newer = staticmethod(lambda: (True, "2099.1: cpu"))
        monkeypatch.setattr(OpenVinoEngine, "available", newer)
    else:
        monkeypatch.setattr(auto, "processor", lambda: {"name": "another"})
    assert auto.verdict_facts(*facts) != before


def test_wrong_numbers_are_passed_over_aloud(
    nano_bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = OpenVinoEngine.run

    def wrong(self: OpenVinoEngine, graph: str, inputs: base.Arrays) -> base.Arrays:
        out = run(self, graph, inputs)
        return {k: v * 1.1 for k, v in out.items()} if graph == "decode" else out

    monkeypatch.setattr(OpenVinoEngine, "run", wrong)
    with pytest.warns(UserWarning, match=r"fails parity here: graph decode is 1\.0e-01.*using onn"):
        assert base.open_engine("auto", nano_bundle).name == "onnxruntime"
    with pytest.warns(UserWarning, match="fails parity"):  # the verdict is kept, and still said
        assert base.open_engine("auto", nano_bundle).name == "onnxruntime"


def test_numbers_that_are_none_do_not_pass(
    nano_bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = OpenVinoEngine(nano_bundle, precision="fp32")
    run = engine.run
    nothing = float("nan")
    monkeypatch.setattr(
        engine, "run", lambda graph, i: {k: v * nothing for k, v in run(graph, i).items()}
    )
    errors = auto.graph_errors(engine, OnnxRuntimeEngine.open(nano_bundle), nano_bundle)
    assert set(errors.values()) == {float("inf")}
    assert "fails parity" in auto.refusal("openvino:fp32", "fp32", errors)


def test_a_fallback_is_said_aloud(
    nano_bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OpenVinoEngine, "available", staticmethod(lambda: absent("openvino")))
    with pytest.warns(UserWarning, match=r"openvino cannot run here: no openvino here.*using onnx"):
        assert base.open_engine("auto", nano_bundle).name == "onnxruntime"
    with pytest.raises(EngineError, match="engine openvino cannot run here: no openvino here"):
        base.open_engine("openvino:fp32", nano_bundle)
    monkeypatch.setattr(OnnxRuntimeEngine, "available", staticmethod(lambda: absent("onnx")))
    with pytest.raises(EngineError, match=r"no engine for 'cpu' runs here: .*no onnx here"):
        base.open_engine("auto", nano_bundle)


def test_without_onnxruntime_exact_openvino_is_the_reference(
    nano_bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntimeEngine, "available", staticmethod(lambda: absent("onnx")))
    engine = base.open_engine("auto", nano_bundle)
    assert engine.name == "openvino"
    assert auto.judged(engine, "openvino:fp32", nano_bundle, cache) == {}


def test_an_engine_that_breaks_is_passed_over_aloud(
    nano_bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> base.Arrays:
        raise EngineError("out of luck")

    monkeypatch.setattr(OpenVinoEngine, "run", broken)
    with pytest.warns(UserWarning, match=r"failed: out of luck.*using onnxruntime on cpu"):
        assert base.open_engine("auto", nano_bundle).name == "onnxruntime"


def test_a_gpu_comes_first_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "has_nvidia", lambda: True)
    assert auto.candidates("auto")[0][1] == "cuda"
    assert auto.candidates("auto")[-1] == ("onnxruntime", "cpu")
    monkeypatch.setattr(auto, "has_nvidia", lambda: False)
    assert {device for _, device in auto.candidates("auto")} == {"cpu"}
    assert auto.candidates("coreml") == [("onnxruntime", "coreml")]


def test_torch_is_the_reference_never_the_choice() -> None:
    """It runs a model folder, which a bundle does not bring."""
    assert TorchEngine.name not in {choice for choice, _ in auto.candidates("cpu")}
