"""A stand-in for `tensorrt`, strict about what the real one has: what builds.

tensorrt_api.json lists every public name of the classes that we use, as the published Python
bindings have them (10.14.1.48, 11.4.0.106, TensorRT-RTX 1.7.1.116). The stand-in for a version has
nothing that its list lacks: what was removed (BuilderFlag.FP16, layer.precision) raises
AttributeError here as there. A plan is the ONNX graph itself; running one (fake_tensorrt_runtime)
runs it in onnxruntime, on memory that the fake driver handed out.
"""

import enum
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from heartbeat_fast.engines import cuda
from tests.fake_cuda import Driver

API: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("tensorrt_api.json").read_text()
)
FLOATS = {TensorProto.FLOAT: "FLOAT", TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16"}


ENUMS = (
    "BuilderFlag",
    "NetworkDefinitionCreationFlag",
    "SerializationFlag",
    "DataType",
    "ExecutionContextAllocationStrategy",
    "ComputeCapability",
    "CudaGraphStrategy",
)


def module(version: str, driver: Driver) -> ModuleType:
    """A `tensorrt` of a version in tensorrt_api.json."""
    names = {kind: set(text.split()) for kind, text in API[version].items()}
    trt = ModuleType("tensorrt_rtx" if version.startswith("rtx") else "tensorrt")
    made: Any = trt
    made.__version__ = version.removeprefix("rtx ")
    made.driver, made.built, made.limits = driver, [], names
    for kind in ENUMS:
        if kind in names:
            members = API[version][kind].split()
            setattr(trt, kind, enum.IntEnum(kind, {name: i for i, name in enumerate(members)}))
    made.float32, made.float16 = made.DataType.FLOAT, made.DataType.HALF
    from tests.fake_tensorrt_runtime import Refitter, Runtime, Weights

    for kind in (Builder, OnnxParser, Runtime, Refitter, Weights, ILogger):
        setattr(trt, kind.__name__, type(kind.__name__, (kind,), {"trt": trt}))
    return trt


class Strict:
    """Public names that a version's real class lacks cannot be read or set."""

    trt: Any

    def _known(self, name: str) -> bool:
        kind = next(k.__name__ for k in type(self).__mro__ if k.__name__ in self.trt.limits)
        return name in self.trt.limits[kind]

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name != "trt" and not self._known(name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name != "trt" and not self._known(name):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        object.__setattr__(self, name, value)


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Builder(Strict):
    def __init__(self, log: Any) -> None:
        self._log = log

    def create_network(self, flags: int) -> "INetworkDefinition":
        return INetworkDefinition(self.trt, flags)

    def create_builder_config(self) -> "IBuilderConfig":
        return IBuilderConfig(self.trt)

    def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
        flags = {flag.name for flag in config._flags}
        targets = [target.name for target in config._targets]
        stripped = "STRIP_PLAN" in flags
        if (stripped or not targets) and not self.trt.driver.gpus:
            self._log.log(ILogger.ERROR, "no CUDA device")
            return None
        self.trt.built.append({"flags": flags, "targets": targets, "network": network._flags})
        return plan(network._proto, {"refit": "REFIT" in flags, "weights": not stripped})


class IBuilderConfig(Strict):
    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self._flags = {trt.BuilderFlag.TF32}  # on by default
        self._targets: list[Any] = []

    def set_flag(self, flag: Any) -> None:
        self._flags.add(self.trt.BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(self.trt.BuilderFlag(flag))

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._targets)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, count: int) -> None:
        self._targets = [self.trt.ComputeCapability.NONE] * count

    def set_compute_capability(self, target: Any, index: int) -> bool:
        self._targets[index] = self.trt.ComputeCapability(target)
        return True


class ITensor(Strict):
    def __init__(self, trt: Any, name: str, shape: tuple[int, ...]) -> None:
        self.trt, self.name, self.shape = trt, name, shape


class INetworkDefinition(Strict):
    def __init__(self, trt: Any, flags: int) -> None:
        self.trt, self._flags = trt, flags
        self._proto = onnx.ModelProto()

    @property
    def num_inputs(self) -> int:
        return len(self._proto.graph.input)

    def get_input(self, index: int) -> ITensor:
        return ITensor(self.trt, *described(self._proto.graph.input[index]))


class ParserError(Strict):
    def __init__(self, trt: Any, text: str) -> None:
        self.trt, self._text = trt, text

    def desc(self) -> str:
        return self._text


class OnnxParser(Strict):
    def __init__(self, network: Any, log: Any) -> None:
        self._network, self._errors = network, [""][:0]

    def parse(self, content: bytes) -> bool:
        try:
            self._network._proto.ParseFromString(content)
        except Exception as error:
            self._errors = [str(error)]
        return not self._errors

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> ParserError:
        return ParserError(self.trt, self._errors[index])


def plan(proto: onnx.ModelProto, state: dict[str, bool]) -> bytes:
    """A plan: what it can do, and the graph, its weights zero where they were stripped."""
    kept = onnx.ModelProto()
    kept.CopyFrom(proto)
    if not state["weights"]:
        for tensor in kept.graph.initializer:
            if tensor.data_type in FLOATS and np.prod(tensor.dims) > 1:
                empty = np.zeros_like(numpy_helper.to_array(tensor))
                tensor.CopyFrom(numpy_helper.from_array(empty, tensor.name))
    return b"PLAN " + json.dumps(state).encode() + b"\n" + kept.SerializeToString()


def described(value: Any) -> tuple[str, tuple[int, ...]]:
    dims = value.type.tensor_type.shape.dim
    return value.name, tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)


def stand_in(monkeypatch: pytest.MonkeyPatch, version: str, **hardware: Any) -> tuple[Driver, Any]:
    """Puts a library of this version and its GPU in place; returns both."""
    driver = Driver(**hardware)
    monkeypatch.setattr(cuda, "driver", lambda: driver)
    made = module(version, driver)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return driver, made
