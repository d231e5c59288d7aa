"""ONNX Runtime: the engine that runs everywhere."""

import warnings
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays, check_inputs, signature
from heartbeat_fast.engines.machine import threads
from heartbeat_fast.errors import EngineError, MissingDependency, optional

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
}


class OnnxRuntimeEngine:
    """Runs the bundle's ONNX graphs; each is read, verified and compiled on first use."""

    name = "onnxruntime"
    precision = "fp32"  # weights are stored in half and cast once, when a session is made

    def __init__(self, bundle: Bundle, device: str) -> None:
        self._ort = optional("onnxruntime", "cpu")
        provider = PROVIDERS.get(device)
        here = self._ort.get_available_providers()
        if provider not in here:
            known = [name for name, of in PROVIDERS.items() if of in here]
            raise EngineError(f"device: {device!r} came; onnxruntime has {', '.join(known)} here")
        self.device = device
        self._providers = list(dict.fromkeys([provider, PROVIDERS["cpu"]]))
        self._bundle = bundle
        self._sessions: dict[str, Any] = {}

    @staticmethod
    def available() -> tuple[bool, str]:
        """Whether onnxruntime imports, and its version with the devices it was built for."""
        try:
            ort = optional("onnxruntime", "cpu")
        except MissingDependency as error:
            return False, str(error)
        here = ort.get_available_providers()
        return (
            True,
            f"{ort.__version__}: {', '.join(n for n, of in PROVIDERS.items() if of in here)}",
        )

    @staticmethod
    def precisions() -> tuple[str, ...]:
        """fp32: what half precision a bundle holds is in its graphs."""
        return ("fp32",)

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cpu", source: str = "") -> "OnnxRuntimeEngine":
        """Binds to a bundle; no graph is loaded yet.

        Raises:
            EngineError: onnxruntime was not built for this device.
        """
        return cls(bundle, device)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs one graph.

        Raises:
            EngineError: no such graph, an input that does not fit it, or a graph that fails.
            BundleError: the graph's file is not what the manifest says.
        """
        spec = signature(graph, self._bundle)
        check_inputs(graph, spec, inputs)
        if graph not in self._sessions:
            self._sessions[graph] = self._session(graph)
        outputs = [tensor.name for tensor in spec.outputs]
        try:
            values = self._sessions[graph].run(outputs, dict(inputs))
        except (
            Exception
        ) as error:  # a graph may load and still not run: ids out of range, no memory
            reason = str(error).splitlines()[0]
            raise EngineError(f"graph {graph}: onnxruntime cannot run it: {reason}") from error
        return dict(zip(outputs, values, strict=True))

    def _session(self, graph: str) -> Any:
        """A session from verified bytes: by path, a file could change between check and load."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads()
        content = self._bundle.read(signature(graph, self._bundle))
        try:
            session = self._ort.InferenceSession(content, options, providers=self._providers)
        except Exception as error:  # onnxruntime raises its own classes, all straight off Exception
            reason = str(error).splitlines()[0]
            raise EngineError(f"graph {graph}: onnxruntime cannot load it: {reason}") from error
        if (got := session.get_providers()[0]) != self._providers[0]:
            warnings.warn(f"graph {graph}: runs on {got}, not {self._providers[0]}", stacklevel=4)
        return session
