"""The run-time half of the stand-in for `tensorrt`: plans loaded, run in onnxruntime, refitted."""

import ctypes
import json
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.fake_tensorrt import FLOATS, ILogger, Strict, described, plan


class Runtime(Strict):
    def __init__(self, log: Any) -> None:
        self._log = log

    def deserialize_cuda_engine(self, content: bytes) -> "ICudaEngine | None":
        head, _, body = bytes(content).partition(b"\n")
        if not head.startswith(b"PLAN "):
            self._log.log(ILogger.ERROR, "magic tag does not match")
            return None
        return ICudaEngine(self.trt, onnx.load_from_string(body), json.loads(head[5:]))


class ICudaEngine(Strict):
    def __init__(self, trt: Any, proto: onnx.ModelProto, state: dict[str, bool]) -> None:
        self.trt, self._proto, self._state = trt, proto, state
        self._ends = [described(v) for v in (*proto.graph.input, *proto.graph.output)]

    @property
    def refittable(self) -> bool:
        return self._state["refit"]

    @property
    def num_io_tensors(self) -> int:
        return len(self._ends)

    @property
    def device_memory_size_v2(self) -> int:
        return 1000 * len(self._proto.graph.node)

    def get_tensor_name(self, index: int) -> str:
        return self._ends[index][0]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return dict(self._ends)[name]

    def create_execution_context(self, given: Any) -> "IExecutionContext":
        return IExecutionContext(self.trt, self, given)

    def create_runtime_config(self) -> "IRuntimeConfig":
        return IRuntimeConfig(self.trt)

    def create_serialization_config(self) -> "ISerializationConfig":
        return ISerializationConfig(self.trt)

    def serialize_with_config(self, config: Any) -> bytes:
        flags = {flag.name for flag in config._flags}
        assert self._state["weights"]
        return plan(
            self._proto,
            {"refit": "INCLUDE_REFIT" in flags, "weights": "EXCLUDE_WEIGHTS" not in flags},
        )


class ISerializationConfig(Strict):
    def __init__(self, trt: Any) -> None:
        self.trt, self._flags = trt, {trt.SerializationFlag.EXCLUDE_WEIGHTS}

    def set_flag(self, flag: Any) -> bool:
        self._flags.add(self.trt.SerializationFlag(flag))
        return True

    def clear_flag(self, flag: Any) -> bool:
        self._flags.discard(self.trt.SerializationFlag(flag))
        return True


class IRuntimeCache(Strict):
    def __init__(self, trt: Any) -> None:
        self.trt, self._content = trt, b""

    def serialize(self) -> bytes:
        return self._content or b"compiled"

    def deserialize(self, content: bytes) -> bool:
        self._content = bytes(content)
        return True


class IRuntimeConfig(Strict):
    def __init__(self, trt: Any) -> None:
        self.trt, self._cache, self._strategy = trt, None, None
        if self._known("cuda_graph_strategy"):
            self.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self.trt)

    def set_runtime_cache(self, cache: Any) -> None:
        self._cache = cache

    def get_runtime_cache(self) -> Any:
        return self._cache


class IExecutionContext(Strict):
    """Refuses to run without weights, without memory of its own or given, or recorded at once."""

    def __init__(self, trt: Any, engine: ICudaEngine, given: Any) -> None:
        self.trt, self._engine = trt, engine
        self._config = given if isinstance(given, IRuntimeConfig) else None
        strategy = self._config._strategy if self._config else given
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._runs = 0
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            engine._proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def get_runtime_config(self) -> Any:
        return self._config

    def set_device_memory(self, address: int, size: int) -> None:
        self._memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in dict(self._engine._ends)
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        ready = self._memory[1] >= self._engine.device_memory_size_v2
        known = self._addresses.keys() == dict(self._engine._ends).keys()
        recording = self.trt.driver.capturing
        if not (stream == 7 and ready and known and self._engine._state["weights"]):
            return False
        if self._memory[0] not in self.trt.driver.memory:
            return False  # freed
        if recording is not None:
            if not self._runs:
                return False
            addresses = dict(self._addresses)
            recording.append(lambda: self._compute(addresses))
            return True
        self._runs += 1
        self._compute(self._addresses)
        return True

    def _compute(self, addresses: dict[str, int]) -> None:
        assert set(addresses.values()) <= self.trt.driver.memory.keys()
        graph = self._engine._proto.graph
        inputs = {v.name: _view(v, addresses[v.name]) for v in graph.input}
        outputs = self._session.run([v.name for v in graph.output], inputs)
        for value, result in zip(graph.output, outputs, strict=True):
            _view(value, addresses[value.name])[...] = result


class Weights(Strict):
    def __init__(self, kind: Any, address: int, count: int) -> None:
        self._kind, self._address, self._count = kind, address, count


class Refitter(Strict):
    """As the real one: a rejected weight returns False; missing ones fail the refit."""

    def __init__(self, engine: Any, log: Any) -> None:
        self._engine, self.weights_validation = engine, False
        tensors = engine._proto.graph.initializer
        self._all = {t.name: t for t in tensors if t.data_type in FLOATS and np.prod(t.dims) > 1}
        self._given: dict[str, bytes] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._all)

    def get_missing_weights(self) -> list[str]:
        return sorted(self._all.keys() - self._given.keys())

    def set_named_weights(self, name: str, weights: Any) -> bool:
        tensor = self._all[name]
        if (FLOATS[tensor.data_type], np.prod(tensor.dims)) != (weights._kind.name, weights._count):
            return False
        size = weights._count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        self._given[name] = ctypes.string_at(weights._address, size)
        return True

    def refit_cuda_engine(self) -> bool:
        if not self.weights_validation or self.get_missing_weights():
            return False
        for name, content in self._given.items():
            self._all[name].ClearField("float_data")
            self._all[name].raw_data = content
        self._engine._state["weights"] = True
        return True


def _view(value: Any, address: int) -> Any:
    """Device memory as the array that a graph's end declares."""
    shape = described(value)[1]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)
