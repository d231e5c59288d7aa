"""TensorRT on NVIDIA's data-centre GPUs: plans from the local cache, one stream, no copies between.

Plans are built from the bundle's ONNX graphs on first use and kept by the engine cache; nothing
else is ever loaded. All graphs share one block of working memory, since they run one after another
on one stream. What `keep` puts out stays on the device; its memory goes back to a pool, so that the
next clip finds the same addresses and the recorded CUDA graph of the denoiser still fits.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from heartbeat_fast.bundle import Bundle, TensorSpec
from heartbeat_fast.engines import cuda
from heartbeat_fast.engines.base import Arrays, check_inputs, signature
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.tensorrt_plan import (
    TENSORRT,
    Family,
    Recipe,
    build,
    facts,
    library,
    logger,
)
from heartbeat_fast.errors import EngineError, MissingDependency

RECORDED = ("denoise",)  # graphs that run often enough for a CUDA graph of their own
RECORDINGS = 8  # of one graph, one for each set of addresses


class Pool:
    """Device memory by tensor name, used again when nobody holds it."""

    def __init__(self) -> None:
        self._free: dict[tuple[str, int], list[cuda.Buffer]] = defaultdict(list)

    def take(self, spec: TensorSpec) -> "DeviceTensor":
        """Memory for a tensor."""
        size = int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
        free = self._free[spec.name, size]
        return DeviceTensor(spec, free.pop() if free else cuda.Buffer(size), self)

    def back(self, name: str, buffer: cuda.Buffer) -> None:
        """Memory that a tensor no longer needs."""
        self._free[name, buffer.size].append(buffer)


class DeviceTensor:
    """An output that stayed on the device: what `keep` returns, and `run` and `keep` take."""

    def __init__(self, spec: TensorSpec, buffer: cuda.Buffer, pool: Pool) -> None:
        self.shape, self.dtype = spec.shape, np.dtype(spec.dtype)
        self.buffer, self._name, self._pool = buffer, spec.name, pool

    def __del__(self) -> None:
        self._pool.back(self._name, self.buffer)


@dataclass
class Loaded:
    """A graph ready to run: its context, memory of its own tensors, recordings by addresses."""

    context: Any
    scratch: int
    own: dict[str, DeviceTensor]
    runs: int = 0
    recordings: dict[tuple[int, ...], Callable[[], None]] = field(default_factory=dict)


class TensorRtEngine:
    """Runs the bundle's graphs as plans; each is built or found, and loaded, on first use."""

    name = "tensorrt"
    family: Family = TENSORRT
    recorded: tuple[str, ...] = RECORDED

    def __init__(
        self, bundle: Bundle, device: str = "cuda", cache: EngineCache | None = None
    ) -> None:
        """No graph is loaded yet.

        Args:
            device: "cuda", "cuda:N", or "auto", the first GPU.
            cache: of plans; the user's own where none is given.

        Raises:
            EngineError: no such GPU, or one that the library does not know.
        """
        self.trt = library(self.family)
        self.gpu = cuda.Gpu.find("cuda" if device == "auto" else device)
        self.recipe = self.recipe_for(self.gpu)
        self.device = f"cuda:{self.gpu.ordinal}"
        self.precision = bundle.manifest.precision
        self.cache = cache or EngineCache()
        self._bundle, self._stream = bundle, cuda.Stream(self.gpu)
        self._log, self._pool = logger(self.trt), Pool()
        self._runtime = self.trt.Runtime(self._log)
        self._scratch: cuda.Buffer | None = None
        self._loaded: dict[str, Loaded] = {}
        self._busy = threading.Lock()

    @classmethod
    def recipe_for(cls, gpu: cuda.Gpu) -> Recipe:
        """How plans for this GPU are built."""
        return Recipe()

    @classmethod
    def available(cls) -> tuple[bool, str]:
        """Whether the library and a GPU are here, and which, or what is missing."""
        try:
            trt = library(cls.family)
            gpu = cuda.Gpu.find("cuda")
            cls.recipe_for(gpu)
        except (EngineError, MissingDependency) as error:
            return False, str(error)
        return True, f"{trt.__version__}: {gpu.name} ({gpu.target})"

    @classmethod
    def precisions(cls) -> tuple[str, ...]:
        """None to choose from: the bundle's graphs say theirs."""
        return ()

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cuda", source: str = "") -> "TensorRtEngine":
        """Binds to a bundle.

        Raises:
            EngineError: no such GPU, or something after the colon, which it has no use for.
        """
        if source:
            raise EngineError(
                f"engine {cls.name}: {source!r} came after the colon; its precision is the "
                "bundle's: open one that was exported in another"
            )
        return cls(bundle, device)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> Arrays:
        """Runs one graph; inputs are arrays, or tensors that `keep` left on the device.

        Raises:
            EngineError: no such graph, an input that does not fit it, or no building it.
        """
        with self._busy:
            loaded = self._enqueue(graph, inputs, {})
            arrays = {}
            for spec in signature(graph, self._bundle).outputs:
                arrays[spec.name] = np.empty(spec.shape, spec.dtype)
                loaded.own[spec.name].buffer.download(arrays[spec.name], self._stream)
            self._stream.wait()
        self.ran(graph, loaded)
        return arrays

    def keep(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As run, but the outputs stay on the device.

        Raises:
            EngineError: as run.
        """
        with self._busy:
            specs = signature(graph, self._bundle).outputs
            kept = {spec.name: self._pool.take(spec) for spec in specs}
            loaded = self._enqueue(graph, inputs, kept)
            self._stream.wait()
        self.ran(graph, loaded)
        return dict(kept)

    def plan(self, graph: str) -> bytes:
        """A graph's plan, from the cache or built now.

        Raises:
            EngineError: the library refuses the graph.
            BundleError: the graph's file is not what the manifest says.
        """
        spec = signature(graph, self._bundle)
        wanted = facts(self.family, spec.sha256, self.recipe, self.gpu)
        make = lambda: build(self.family, self._bundle.read(spec), self.recipe, graph)  # noqa: E731
        return self.cache.load(wanted, make, f"{self._bundle.manifest.name} {graph}")

    def context(self, graph: str, engine: Any) -> Any:
        """An execution context that has no working memory of its own."""
        return engine.create_execution_context(
            self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )

    def ran(self, graph: str, loaded: Loaded) -> None:
        """Called after each run, outside the lock."""
        loaded.runs += 1

    def _enqueue(
        self, graph: str, inputs: Mapping[str, Any], kept: Mapping[str, DeviceTensor]
    ) -> Loaded:
        """Puts one run on the stream. Outputs go to `kept` by name, else to the graph's own."""
        check_inputs(graph, signature(graph, self._bundle), inputs)
        self._stream.enter()
        if graph not in self._loaded:
            self._loaded[graph] = self._load(graph)
        loaded = self._loaded[graph]
        tensors = {**loaded.own, **kept}
        for name, value in inputs.items():
            if isinstance(value, DeviceTensor):
                tensors[name] = value
            else:
                tensors[name].buffer.upload(value, self._stream)
        addresses = tuple(tensor.buffer.address for tensor in tensors.values())
        if addresses not in loaded.recordings:
            for name, tensor in tensors.items():
                loaded.context.set_tensor_address(name, tensor.buffer.address)
        # The first run of a context may allocate, which cannot be recorded.
        if graph in self.recorded and loaded.runs:
            self._replay(graph, loaded, addresses)
        else:
            self._execute(graph, loaded)
        return loaded

    def _replay(self, graph: str, loaded: Loaded, addresses: tuple[int, ...]) -> None:
        if addresses not in loaded.recordings:
            if len(loaded.recordings) >= RECORDINGS:
                loaded.recordings.pop(next(iter(loaded.recordings)))
            record = self._stream.record(lambda: self._execute(graph, loaded))
            loaded.recordings[addresses] = record
        loaded.recordings[addresses]()

    def _execute(self, graph: str, loaded: Loaded) -> None:
        if not loaded.context.execute_async_v3(self._stream.handle):
            raise EngineError(f"graph {graph}: {self.name} does not run it: {self._log.last()}")

    def _load(self, graph: str) -> Loaded:
        """A plan's context, once its tensors are those of the manifest."""
        engine = self._runtime.deserialize_cuda_engine(self.plan(graph))
        if engine is None:
            raise EngineError(f"graph {graph}: {self.name} cannot load it: {self._log.last()}")
        spec = signature(graph, self._bundle)
        wanted = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        for name in sorted({*names, *wanted}):
            shape = tuple(engine.get_tensor_shape(name)) if name in names else None
            if name not in wanted or shape != wanted[name].shape:
                raise EngineError(f"graph {graph}: its plan has {name} {shape}, not the manifest's")
        size = int(engine.device_memory_size_v2)
        loaded = Loaded(
            self.context(graph, engine),
            size,
            {name: self._pool.take(tensor) for name, tensor in wanted.items()},
        )
        self._share([*self._loaded.values(), loaded])
        return loaded

    def _share(self, graphs: list[Loaded]) -> None:
        """One block of working memory for all, of the largest's size. Recordings hold the old
        block's address, so they go with it."""
        size = max(loaded.scratch for loaded in graphs)
        if self._scratch is None or self._scratch.size < size:
            self._stream.wait()
            for loaded in graphs:
                loaded.recordings.clear()
            self._scratch = cuda.Buffer(size)
        for loaded in graphs:
            loaded.context.set_device_memory(self._scratch.address, self._scratch.size)
