"""The CUDA driver's library with host memory: what heartbeat_fast.engines.cuda calls of it."""

import ctypes
from collections.abc import Callable
from typing import Any


class Driver:
    """libcuda with host memory; `gpus` of compute capability 9.0 (or `capability`)."""

    def __init__(self, gpus: int = 1, capability: tuple[int, int] = (9, 0)) -> None:
        self.gpus, self.capability = gpus, capability
        self.memory: dict[int, Any] = {}
        self.calls: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.uploaded = 0  # bytes

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name != "cuGetErrorName":
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def cuInit(self, flags: int) -> int:
        return 0

    def cuGetErrorName(self, status: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_FAKE"
        return 0

    def cuDeviceGetCount(self, number: Any) -> int:
        number._obj.value = self.gpus
        return 0

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        device._obj.value = ordinal.value
        return 0

    def cuDeviceGetName(self, name: Any, size: Any, device: Any) -> int:
        name.value = b"Stand-in GPU"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: Any, device: Any) -> int:
        value._obj.value = self.capability[attribute.value - 75]
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 13020
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        return 0

    def cuStreamCreate(self, stream: Any, flags: Any) -> int:
        stream._obj.value = 7
        return 0

    def cuStreamSynchronize(self, stream: Any) -> int:
        return 0 if self.capturing is None else 900

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:
        if self.capturing is not None:
            return 900
        block = ctypes.create_string_buffer(b"\xff" * (size.value + 256), size.value + 256)  # NaN
        address = -(-ctypes.addressof(block) // 256) * 256
        self.memory[address] = block
        pointer._obj.value = address
        return 0

    def cuMemFree_v2(self, pointer: Any) -> int:
        del self.memory[pointer.value]
        return 0

    def cuMemcpyHtoDAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        self.uploaded += size.value
        ctypes.memmove(to.value, source.value, size.value)
        return 0 if self.capturing is None else 900

    def cuMemcpyDtoHAsync_v2(self, to: Any, source: Any, size: Any, stream: Any) -> int:
        ctypes.memmove(to.value, source.value, size.value)
        return 0 if self.capturing is None else 900

    def cuStreamBeginCapture_v2(self, stream: Any, mode: Any) -> int:
        self.capturing = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        graph._obj.value = len(self.graphs) + 1
        self.graphs[graph._obj.value], self.capturing = self.capturing or [], None
        return 0

    def cuGraphInstantiateWithFlags(self, ready: Any, graph: Any, flags: Any) -> int:
        ready._obj.value = graph.value
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:
        for work in self.graphs[graph.value]:
            work()
        return 0
