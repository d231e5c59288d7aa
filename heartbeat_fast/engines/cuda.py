"""The little of CUDA that an engine needs, by the driver's own library: memory, one stream, graphs.

Where a GPU is, its driver is, so this takes no package: libcuda through ctypes. TensorRT works in
the device's primary context, which is the one retained here.
"""

import ctypes
import sys
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import EngineError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
THREAD_LOCAL_CAPTURE = 1  # other threads may go on using CUDA while this one records
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…


@cache
def driver() -> Any:
    """The driver's library, initialised.

    Raises:
        EngineError: there is none, or it has no device.
    """
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise EngineError(f"no CUDA driver here ({error})") from error
    if status := library.cuInit(0):
        raise EngineError(f"the CUDA driver does not start (error {status})")
    return library


def call(name: str, *arguments: Any) -> None:
    """Calls a function of the driver.

    Raises:
        EngineError: it did not return success; names the function and the error.
    """
    library = driver()
    if status := getattr(library, name)(*arguments):
        text = c_char_p()
        library.cuGetErrorName(status, byref(text))
        raise EngineError(f"CUDA: {name} returned {(text.value or b'?').decode()} ({status})")


def count() -> int:
    """How many GPUs there are; 0 without a driver."""
    number = c_int()
    try:
        call("cuDeviceGetCount", byref(number))
    except EngineError:
        return 0
    return number.value


@dataclass(frozen=True)
class Gpu:
    """What an engine is built for: ordinal, name, compute capability ("SM90"), driver's CUDA."""

    ordinal: int
    name: str
    target: str
    driver: int

    @classmethod
    def find(cls, device: str) -> "Gpu":
        """The GPU called "cuda" or "cuda:N".

        Raises:
            EngineError: another name, or no such GPU.
        """
        kind, _, number = device.partition(":")
        here = count()
        if kind != "cuda" or (number and not number.isdecimal()) or int(number or 0) >= here:
            raise EngineError(f"device: {device!r} came; wanted cuda or cuda:N, {here} GPUs here")
        ordinal, version, name = c_int(), c_int(), ctypes.create_string_buffer(256)
        call("cuDeviceGet", byref(ordinal), c_int(int(number or 0)))
        call("cuDeviceGetName", name, c_int(256), ordinal)
        call("cuDriverGetVersion", byref(version))
        parts = []
        for attribute in (MAJOR, MINOR):
            value = c_int()
            call("cuDeviceGetAttribute", byref(value), c_int(attribute), ordinal)
            parts.append(str(value.value))
        return cls(ordinal.value, name.value.decode(), f"SM{''.join(parts)}", version.value)


class Stream:
    """A GPU's primary context and one stream in it; everything an engine does is in its order."""

    def __init__(self, gpu: Gpu) -> None:
        self._context, self._stream = c_void_p(), c_void_p()
        call("cuDevicePrimaryCtxRetain", byref(self._context), c_int(gpu.ordinal))
        self.enter()
        call("cuStreamCreate", byref(self._stream), c_uint(1))  # does not wait for the default one

    @property
    def handle(self) -> int:
        """The stream as TensorRT takes it."""
        return self._stream.value or 0

    def enter(self) -> None:
        """Makes the context this thread's."""
        call("cuCtxSetCurrent", self._context)

    def wait(self) -> None:
        """Returns when all that was asked for is done."""
        call("cuStreamSynchronize", self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work as a CUDA graph: what it puts on the stream is recorded, and replayed by a call.

        Raises:
            EngineError: something in it cannot be recorded.
        """
        graph, ready = c_void_p(), c_void_p()
        call("cuStreamBeginCapture_v2", self._stream, c_int(THREAD_LOCAL_CAPTURE))
        try:
            work()
        finally:
            call("cuStreamEndCapture", self._stream, byref(graph))
        call("cuGraphInstantiateWithFlags", byref(ready), graph, c_uint64(0))
        call("cuGraphDestroy", graph)
        return lambda: call("cuGraphLaunch", ready, self._stream)


class Buffer:
    """Device memory, freed with the object."""

    def __init__(self, size: int) -> None:
        """Raises EngineError where the device has not so much left."""
        self.size, pointer = size, c_uint64()
        self.address = 0
        call("cuMemAlloc_v2", byref(pointer), c_size_t(max(size, 1)))
        self.address = pointer.value
        self._free = driver().cuMemFree_v2

    def upload(self, array: NDArray[Any], stream: Stream) -> None:
        """Copies a contiguous array in; the array may change once this has returned."""
        array = np.ascontiguousarray(array)
        source = array.ctypes.data_as(c_void_p)
        to, size = c_uint64(self.address), c_size_t(array.nbytes)
        call("cuMemcpyHtoDAsync_v2", to, source, size, c_void_p(stream.handle))

    def download(self, array: NDArray[Any], stream: Stream) -> None:
        """Copies out into a contiguous array, which is filled when the stream has been waited
        for."""
        target = array.ctypes.data_as(c_void_p)
        source, size = c_uint64(self.address), c_size_t(array.nbytes)
        call("cuMemcpyDtoHAsync_v2", target, source, size, c_void_p(stream.handle))

    def __del__(self) -> None:
        if self.address:
            self._free(c_uint64(self.address))
