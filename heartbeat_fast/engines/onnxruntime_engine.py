"""ONNX Runtime: the engine that runs everywhere, and its execution providers by device name."""

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle, GraphSpec
from heartbeat_fast.engines import onnxruntime_providers as providers
from heartbeat_fast.engines.base import Arrays, check_inputs, signature
from heartbeat_fast.engines.machine import is_whole, threads
from heartbeat_fast.engines.tensorrt_plugins import refuse
from heartbeat_fast.errors import EngineError, MissingDependency, optional

CAPTURED = "denoise"  # the graph that runs every step, and may be replayed as a CUDA graph


@dataclass(frozen=True)
class Kept:
    """A graph's output that stays on the device."""

    value: Any
    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass
class _Fixed:
    """Tensors at addresses that do not change, as a CUDA graph needs; what each input last took."""

    binding: Any
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    came: dict[str, Kept] = field(default_factory=dict)
    busy: threading.Lock = field(default_factory=threading.Lock)


class OnnxRuntimeEngine:
    """Runs the bundle's ONNX graphs; each is read, verified and compiled on first use."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, device: str, source: str = "") -> None:
        refuse(bundle, self.name)
        self._ort = optional("onnxruntime", "cpu")
        self._provider = providers.find(self._ort, device)
        if source not in ("", "graph"):
            raise EngineError(f"engine onnxruntime: {source!r} came; wanted nothing, or graph")
        if source and not (self._provider.capture and hasattr(self._ort, "copy_tensors")):
            raise EngineError(f"engine onnxruntime: no CUDA graph on {device}: leave out :graph")
        self._capture = bool(source)
        self.device, self.precision = device, bundle.manifest.precision
        self._bundle = bundle
        self._sessions: dict[str, Any] = {}
        self._loading = threading.Lock()
        self._fixed: _Fixed | None = None
        if self.precision == "bf16":  # which its CPU lacks: said now, by the smallest graph
            self._session("time")

    @staticmethod
    def available() -> tuple[bool, str]:
        """Whether onnxruntime imports, and its version with the devices it was built for."""
        try:
            ort = optional("onnxruntime", "cpu")
        except MissingDependency as error:
            return False, str(error)
        return True, f"{ort.__version__}: {', '.join(providers.here(ort))}"

    @staticmethod
    def precisions() -> tuple[str, ...]:
        """None to choose from: the bundle's graphs say theirs."""
        return ()

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cpu", source: str = "") -> "OnnxRuntimeEngine":
        """Binds to a bundle; no graph is loaded yet. Source "graph": denoise as one CUDA graph.

        Raises:
            EngineError: onnxruntime was not built for this device, it has no CUDA graphs, or it
                cannot load the bundle's precision or flavour.
        """
        return cls(bundle, device, source)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> Arrays:
        """Runs one graph; inputs may be what `keep` returned.

        Raises:
            EngineError: no such graph, an input that does not fit it, or a graph that fails.
            BundleError: the graph's file is not what the manifest says.
        """
        spec = signature(graph, self._bundle)
        check_inputs(graph, spec, inputs)
        names = [tensor.name for tensor in spec.outputs]
        session = self._session(graph)
        with _one_line(f"graph {graph}: onnxruntime cannot run it"):
            if self._provider.memory == "cpu":
                # Arrays go in without a copy, and come out as the caller's own.
                values = session.run(names, dict(inputs))
            elif self._capture and graph == CAPTURED:
                values = self._replay(session, spec, inputs)
            else:
                values = [value.numpy() for value in self._bound(session, spec, inputs, "cpu")]
        return dict(zip(names, values, strict=True))

    def keep(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As run, but the outputs stay on the device, for later graphs to take.

        Raises:
            EngineError, BundleError: as run.
        """
        if self._provider.memory == "cpu" or (self._capture and graph == CAPTURED):
            return dict(self.run(graph, inputs))
        spec = signature(graph, self._bundle)
        check_inputs(graph, spec, inputs)
        session = self._session(graph)
        with _one_line(f"graph {graph}: onnxruntime cannot run it"):
            values = self._bound(session, spec, inputs, self._provider.memory)
        return {
            tensor.name: Kept(value, tensor.shape, np.dtype(tensor.dtype))
            for tensor, value in zip(spec.outputs, values, strict=True)
        }

    def _bound(
        self, session: Any, spec: GraphSpec, inputs: Mapping[str, Any], where: str
    ) -> list[Any]:
        """Runs with inputs on the device and outputs `where`; only arrays are copied there."""
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, self._on_device(value))
        for tensor in spec.outputs:
            binding.bind_output(tensor.name, where)
        session.run_with_iobinding(binding)
        outputs: list[Any] = binding.get_outputs()
        return outputs

    def _replay(
        self, session: Any, spec: GraphSpec, inputs: Mapping[str, Any]
    ) -> list[NDArray[Any]]:
        """Runs on tensors that never move: onnxruntime captures the first run, later ones replay.

        What `keep` returned is copied on the device, once as long as it is the same.
        """
        if self._fixed is None:
            self._fixed = self._fix(session, spec)
        fixed = self._fixed
        with fixed.busy:
            for name, value in inputs.items():
                if not isinstance(value, Kept):
                    fixed.came.pop(name, None)
                    fixed.inputs[name].update_inplace(np.ascontiguousarray(value))
                elif fixed.came.get(name) is not value:
                    self._ort.copy_tensors([value.value], [fixed.inputs[name]])
                    fixed.came[name] = value
            session.run_with_iobinding(fixed.binding)
            return [fixed.outputs[tensor.name].numpy() for tensor in spec.outputs]

    def _fix(self, session: Any, spec: GraphSpec) -> _Fixed:
        def empty(tensor: Any) -> Any:
            make = self._ort.OrtValue.ortvalue_from_shape_and_type
            return make(list(tensor.shape), np.dtype(tensor.dtype), self._provider.memory, 0)

        fixed = _Fixed(
            session.io_binding(),
            {tensor.name: empty(tensor) for tensor in spec.inputs},
            {tensor.name: empty(tensor) for tensor in spec.outputs},
        )
        for name, value in fixed.inputs.items():
            fixed.binding.bind_ortvalue_input(name, value)
        for name, value in fixed.outputs.items():
            fixed.binding.bind_ortvalue_output(name, value)
        return fixed

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, Kept):
            return value.value
        array = np.ascontiguousarray(value)
        return self._ort.OrtValue.ortvalue_from_numpy(array, self._provider.memory, 0)

    def _session(self, graph: str) -> Any:
        with self._loading:
            if graph not in self._sessions:
                self._sessions[graph] = self._load(graph)
            return self._sessions[graph]

    def _load(self, graph: str) -> Any:
        """A session from verified bytes: by path, a file could change between check and load."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        # On a machine of its own, 0: onnxruntime takes one thread a core and pins each.
        options.intra_op_num_threads = 0 if is_whole() else threads()
        # Eight sessions with a pool each: one that goes on spinning takes cores from the next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Memory of one clip of tiny: 1057 MB; without patterns, which reserve each graph's peak
        # apart, 630; with one arena for all graphs too, 530, in the same time.
        if self.device == "cpu":
            options.enable_mem_pattern = False
            _make_arena(self._ort)
            options.add_session_config_entry("session.use_env_allocators", "1")
        chosen = providers.attach(
            self._ort, options, self._provider, self._capture and graph == CAPTURED
        )
        content = self._bundle.read(signature(graph, self._bundle))
        fix = ""
        if self.precision == "bf16":
            fix = f" (bf16 on {self.device}: use engine openvino, or export with --precision fp32)"
        with _one_line(f"graph {graph}: onnxruntime cannot load it{fix}"):
            session = self._ort.InferenceSession(content, options, providers=chosen)
        if (got := session.get_providers()[0]) != self._provider.name:
            warnings.warn(f"graph {graph}: runs on {got}, not {self._provider.name}", stacklevel=5)
        return session


@cache
def _make_arena(ort: Any) -> None:
    """One arena on the processor for all sessions of this process that ask for it."""
    kind, memory = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    # Grown by what is asked for (1), not to the next power of two.
    grown = ort.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": 1})
    ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, memory), grown)


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turns onnxruntime's errors, classes of its own straight off Exception, into ours."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EngineError(f"{what}: {reason}") from error
