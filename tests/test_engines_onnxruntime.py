"""ONNX Runtime's providers: what a GPU would run is held to onnxruntime's interface by a fake.

The fake computes on the CPU what it is asked for, counts every copy between host and device, and
refuses what onnxruntime refuses. What it cannot show is that the real providers give these numbers.
"""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from heartbeat_export.parity import beating_ring
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import onnxruntime_engine, onnxruntime_providers
from heartbeat_fast.engines.base import Resident
from heartbeat_fast.engines.onnxruntime_engine import Kept, OnnxRuntimeEngine
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class FakeValue:
    """An OrtValue: numbers that lie on a device."""

    def __init__(self, ort: "FakeOrt", array: NDArray[Any], device: str) -> None:
        self.ort, self.array, self.device = ort, array, device

    def numpy(self) -> NDArray[Any]:
        if self.device != "cpu":
            self.ort.copies.append("to host")
        return self.array.copy()

    def update_inplace(self, array: NDArray[Any]) -> None:
        assert array.shape == self.array.shape
        self.ort.copies.append("to device")
        self.array[...] = array


class FakeBinding:
    def __init__(self, ort: "FakeOrt") -> None:
        self.ort, self.inputs, self.outputs = ort, {}, {}  # type: ignore[var-annotated]

    def bind_ortvalue_input(self, name: str, value: FakeValue) -> None:
        assert value.device == "cuda", f"{name} lies on the {value.device}"
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: FakeValue) -> None:
        self.outputs[name] = value

    def bind_output(self, name: str, device: str) -> None:
        self.outputs[name] = device

    def get_outputs(self) -> list[FakeValue]:
        return self.results


class FakeSession:
    """Runs the real CPU session behind it."""

    def __init__(self, ort: "FakeOrt", content: bytes, options: Any, providers: Any) -> None:
        self.ort, self.captured = ort, None
        self.chain = providers or [(options.devices[0].ep_name, options.device_options), (CPU, {})]
        self.real = onnxruntime.InferenceSession(content, providers=[CPU])

    def get_providers(self) -> list[str]:
        return self.ort.starts or [name for name, _ in self.chain]

    def run(self, names: list[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        values: list[NDArray[Any]] = self.real.run(names, inputs)
        return values

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self.ort)

    def run_with_iobinding(self, binding: FakeBinding) -> None:
        own = self.chain[0][1]
        if "1" in (own.get("enable_cuda_graph"), own.get("trt_cuda_graph_enable")):
            places = [id(v.array) for v in (*binding.inputs.values(), *binding.outputs.values())]
            assert self.captured in (None, places), "a captured graph's tensors have moved"
            self.captured = places
        values = self.real.run(None, {name: v.array for name, v in binding.inputs.items()})
        binding.results = []
        for (name, place), array in zip(binding.outputs.items(), values, strict=True):
            if isinstance(place, FakeValue):
                place.array[...] = array
            else:
                self.ort.copies += ["to host"] if place == "cpu" else []
                binding.results.append(FakeValue(self.ort, array, place))
            assert name


class FakeOptions(SimpleNamespace):
    def add_session_config_entry(self, key: str, value: str) -> None:
        setattr(self, key, value)

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        self.devices, self.device_options = devices, options


class FakeOrt:
    """The module onnxruntime as a GPU build shows it."""

    __version__ = "1.31.0"
    SessionOptions = FakeOptions

    def __init__(self) -> None:
        self.copies: list[str] = []
        self.sessions: list[FakeSession] = []
        self.starts: list[str] = []
        self.plugins: dict[str, str] = {}
        self.built_in = ["TensorrtExecutionProvider", CUDA, "DmlExecutionProvider", CPU]
        self.OrtValue = SimpleNamespace(
            ortvalue_from_numpy=self._from_numpy,
            ortvalue_from_shape_and_type=lambda shape, dtype, device, index: FakeValue(
                self, np.zeros(shape, dtype), device
            ),
        )

    def _from_numpy(self, array: NDArray[Any], device: str, index: int) -> FakeValue:
        assert array.flags.c_contiguous
        self.copies.append("to device")
        return FakeValue(self, array.copy(), device)

    def get_available_providers(self) -> list[str]:
        return self.built_in

    def copy_tensors(self, src: list[FakeValue], dst: list[FakeValue]) -> None:
        self.copies.append("on device")
        dst[0].array[...] = src[0].array

    def get_ep_devices(self) -> list[Any]:
        return [SimpleNamespace(ep_name=name) for name in (CPU, *self.plugins)]

    def register_execution_provider_library(self, name: str, path: str) -> None:
        if not Path(path).is_file():
            raise RuntimeError(f"no library {path}\nand a second line")
        self.plugins[name] = path

    def InferenceSession(self, content: bytes, options: Any, providers: Any) -> FakeSession:
        self.options = options
        self.sessions.append(FakeSession(self, content, options, providers))
        return self.sessions[-1]


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> FakeOrt:
    fake = FakeOrt()
    monkeypatch.setattr(onnxruntime_engine, "optional", lambda module, extra: fake)
    return fake


def clip(bundle: Bundle, engine: OnnxRuntimeEngine, guidance: float = 1.0) -> NDArray[np.uint8]:
    ring = beating_ring(bundle.manifest.frames, bundle.manifest.size)
    return Generator(bundle, engine)(ring, steps=4, guidance=guidance, seed=3).frames


def denoise_inputs(bundle: Bundle, engine: OnnxRuntimeEngine) -> tuple[dict[str, Any], Any]:
    """The denoise graph's inputs with K and V kept on the device, and a z."""
    chance = np.random.default_rng(0)
    graphs = bundle.manifest.graphs

    def noise(graph: str) -> dict[str, Any]:
        return {s.name: chance.standard_normal(s.shape, np.float32) for s in graphs[graph].inputs}

    inputs = noise("denoise") | engine.keep("context", noise("context"))
    return inputs, inputs.pop("z")


@pytest.mark.parametrize("source", ["", "graph"])
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_gpu_clips_equal_the_cpus(
    device: str, source: str, nano_bundle: Bundle, ort: FakeOrt
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = clip(nano_bundle, OnnxRuntimeEngine(nano_bundle, device, source), guidance=2.0)
    with pytest.MonkeyPatch.context() as real:
        real.setattr(onnxruntime_engine, "optional", lambda module, extra: onnxruntime)
        wanted = clip(nano_bundle, OnnxRuntimeEngine(nano_bundle, "cpu"), guidance=2.0)
    assert wanted.std() > 5
    assert np.abs(got.astype(int) - wanted).max() <= 1


def test_what_is_kept_is_not_copied_again(nano_bundle: Bundle, ort: FakeOrt) -> None:
    engine = OnnxRuntimeEngine(nano_bundle, "cuda")
    assert isinstance(engine, Resident)
    inputs, z = denoise_inputs(nano_bundle, engine)
    assert all(isinstance(v, Kept) for k, v in inputs.items() if k.startswith("kv"))
    assert "to host" not in ort.copies  # context's outputs stayed
    ort.copies.clear()
    engine.run("denoise", inputs | {"z": z})
    assert ort.copies.count("to device") == 3  # z, temb and local came as arrays
    assert ort.copies.count("to host") == 1


def test_a_captured_graph_copies_only_what_changed(nano_bundle: Bundle, ort: FakeOrt) -> None:
    engine = OnnxRuntimeEngine(nano_bundle, "cuda", "graph")
    inputs, z = denoise_inputs(nano_bundle, engine)
    plain = OnnxRuntimeEngine(nano_bundle, "cuda")
    wanted = [plain.run("denoise", inputs | {"z": z + i})["out"] for i in range(2)]
    kept = sum(isinstance(value, Kept) for value in inputs.values())
    ort.copies.clear()
    got = [engine.run("denoise", inputs | {"z": z})["out"]]
    assert ort.copies.count("on device") == kept
    ort.copies.clear()
    got.append(engine.run("denoise", inputs | {"z": z + 1})["out"])
    assert ort.copies.count("on device") == 0
    for one, other in zip(got, wanted, strict=True):
        assert np.array_equal(one, other)
    again = engine.keep(
        "context",
        {
            s.name: np.ones(s.shape, np.float32)
            for s in nano_bundle.manifest.graphs["context"].inputs
        },
    )
    changed = engine.run("denoise", inputs | again | {"z": z})["out"]
    assert np.array_equal(changed, plain.run("denoise", inputs | again | {"z": z})["out"])
    assert not np.array_equal(changed, got[0])


def test_options_of_each_provider(nano_bundle: Bundle, ort: FakeOrt) -> None:
    t = {"t": np.ones(1, np.float32)}
    OnnxRuntimeEngine(nano_bundle, "cuda", "graph").run("time", t)
    assert ort.sessions[-1].chain[0][1].get("enable_cuda_graph") is None  # only denoise is captured
    assert ort.sessions[-1].chain[0] == (CUDA, onnxruntime_providers.PROVIDERS["cuda"].options)
    assert ort.sessions[-1].chain[1] == (CPU, {})
    OnnxRuntimeEngine(nano_bundle, "tensorrt").run("time", t)
    names = [name for name, _ in ort.sessions[-1].chain]
    assert names == ["TensorrtExecutionProvider", CUDA, CPU]
    assert ort.sessions[-1].chain[0][1]["trt_engine_cache_enable"] == "0"
    OnnxRuntimeEngine(nano_bundle, "directml").run("time", t)
    assert ort.options.enable_mem_pattern is False


def test_the_rtx_plugin_is_registered_once(
    nano_bundle: Bundle, ort: FakeOrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, module = "NvTensorRTRTXExecutionProvider", "onnxruntime_ep_nv_tensorrt_rtx"
    with pytest.raises(EngineError, match="'tensorrt-rtx' came; onnxruntime has cpu, cuda"):
        OnnxRuntimeEngine(nano_bundle, "tensorrt-rtx")
    library = tmp_path / "plugin.so"
    plugin = SimpleNamespace(get_library_path=lambda: str(library))
    monkeypatch.setattr(onnxruntime_providers, "find_spec", lambda wanted: wanted == module)
    monkeypatch.setattr(onnxruntime_providers, "optional", lambda wanted, extra: plugin)
    t = {"t": np.ones(1, np.float32)}
    with pytest.raises(EngineError, match=rf"{name} not loaded: no library \S+plugin.so$"):
        OnnxRuntimeEngine(nano_bundle, "tensorrt-rtx").run("time", t)
    library.touch()
    monkeypatch.setattr(ort, "get_ep_devices", lambda: [])
    with pytest.raises(EngineError, match="finds no device that it runs on"):
        OnnxRuntimeEngine(nano_bundle, "tensorrt-rtx").run("time", t)
    monkeypatch.undo()
    monkeypatch.setattr(onnxruntime_engine, "optional", lambda wanted, extra: ort)
    monkeypatch.setattr(onnxruntime_providers, "find_spec", lambda wanted: wanted == module)
    monkeypatch.setattr(onnxruntime_providers, "optional", lambda wanted, extra: plugin)
    engine = OnnxRuntimeEngine(nano_bundle, "tensorrt-rtx", "graph")
    library.unlink()  # a second registration would fail
    assert engine.run("time", t)["temb"].std() > 0
    assert ort.sessions[-1].get_providers()[0] == name


def test_a_fallback_inside_onnxruntime_is_said_aloud(nano_bundle: Bundle, ort: FakeOrt) -> None:
    ort.starts = [CPU]
    with pytest.warns(UserWarning, match=f"graph time: runs on {CPU}, not {CUDA}"):
        OnnxRuntimeEngine(nano_bundle, "cuda").run("time", {"t": np.ones(1, np.float32)})


def test_cuda_graphs_are_refused_where_there_are_none(nano_bundle: Bundle, ort: FakeOrt) -> None:
    with pytest.raises(EngineError, match="no CUDA graph on cpu: leave out :graph"):
        OnnxRuntimeEngine(nano_bundle, "cpu", "graph")
    with pytest.raises(EngineError, match="'fp8' came; wanted nothing, or graph"):
        OnnxRuntimeEngine(nano_bundle, "cuda", "fp8")


def test_on_the_cpu_nothing_is_copied_in_and_results_are_the_callers(nano_bundle: Bundle) -> None:
    engine = OnnxRuntimeEngine.open(nano_bundle)
    t = {"t": np.array([500.0], np.float32)}
    first = engine.run("time", t)["temb"]
    kept = first.copy()
    engine.run("time", {"t": t["t"] / 2})
    assert np.array_equal(first, kept)
    assert isinstance(engine.keep("time", t)["temb"], np.ndarray)


def test_a_graph_that_fails_is_one_line(
    nano_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nat some line of C++")

    engine = OnnxRuntimeEngine.open(nano_bundle)
    monkeypatch.setattr(engine, "_session", lambda graph: SimpleNamespace(run=fail))
    message = "^graph time: onnxruntime cannot run it: out of memory$"
    with pytest.raises(EngineError, match=message):
        engine.run("time", {"t": np.ones(1, np.float32)})
