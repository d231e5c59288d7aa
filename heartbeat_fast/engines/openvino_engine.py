"""OpenVINO: the fastest engine on x86 processors, and the one with bfloat16 and int8 there.

Shapes are static. Each graph has one inference request whose tensors are the caller's arrays, bound
without a copy and bound anew only when another array comes: over a clip's steps K, V and the local
features stay as they are, and only the latents and the time embedding change.
"""

import io
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays, check_inputs, signature
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.machine import is_whole, threads
from heartbeat_fast.engines.openvino_rewrites import REWRITES, norms_in_one_go
from heartbeat_fast.engines.tensorrt_plugins import refuse
from heartbeat_fast.errors import EngineError, MissingDependency, optional

# What a precision asks of the processor, and the type OpenVINO then computes in. Quantised layers
# are int8; what stays between them is bfloat16 where there is that.
NEEDS = {"bf16": "BF16", "fp32": "FP32", "int8": "INT8"}
QUANTISATION = 1  # of the recipe in heartbeat_export/quantise.py: another makes other graphs
QUANTISED = ("denoise", "decode")  # the other graphs run once a clip, or in microseconds
# Sinusoids of t = 500 in bfloat16 were 2.3e-2 off (tiny), and this graph runs once a sampler.
ALWAYS_EXACT = ("time",)


@dataclass
class _Loaded:
    """A compiled graph, its one request, and the arrays its inputs are bound to."""

    request: Any
    busy: threading.Lock = field(default_factory=threading.Lock)
    bound: dict[str, NDArray[Any]] = field(default_factory=dict)


class OpenVinoEngine:
    """Runs the bundle's ONNX graphs; each is read, verified and compiled on first use."""

    name = "openvino"

    def __init__(
        self,
        bundle: Bundle,
        device: str = "cpu",
        precision: str = "",
        cache: EngineCache | None = None,
    ) -> None:
        """No graph is loaded yet.

        Args:
            device: "cpu"; or another device that this OpenVINO sees, in lower case.
            precision: "fp32", "bf16" or "int8"; "" is bf16 where the processor has it, else fp32.
            cache: of compiled graphs; the user's own where none is given.

        Raises:
            EngineError: no such device or precision here, or a bundle of the plugin flavour.
        """
        refuse(bundle, self.name)
        self._ov = optional("openvino", "openvino")
        self._core = self._ov.Core()
        seen = [known.lower() for known in self._core.available_devices]
        if device not in seen:
            raise EngineError(f"device: {device!r} came; openvino sees {', '.join(seen)} here")
        can = _precisions(self._core, device.upper())
        if precision and precision not in can:
            raise EngineError(
                f"engine openvino: precision {precision!r} came; {device} has {', '.join(can)} here"
            )
        self.device, self.precision = device, precision or can[0]
        self._between = "bf16" if "bf16" in can and self.precision != "fp32" else "f32"
        self._bundle, self._cache = bundle, cache or EngineCache()
        self._loaded: dict[str, _Loaded] = {}
        self._loading = threading.Lock()

    @staticmethod
    def available() -> tuple[bool, str]:
        """Whether openvino imports, and its version with the devices it sees."""
        try:
            ov = optional("openvino", "openvino")
        except MissingDependency as error:
            return False, str(error)
        seen = ", ".join(device.lower() for device in ov.Core().available_devices)
        return bool(seen), f"{ov.__version__}: {seen or 'no device'}"

    @staticmethod
    def precisions() -> tuple[str, ...]:
        """Those of this processor; bf16 only where it computes in it."""
        try:
            return _precisions(optional("openvino", "openvino").Core(), "CPU")
        except MissingDependency:
            return ()

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cpu", source: str = "") -> "OpenVinoEngine":
        """Binds to a bundle; `source` is the precision, "" for the fastest exact one.

        Raises:
            EngineError: no such device or precision here.
        """
        return cls(bundle, device, source)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs one graph. Several threads may; of one graph each waits for the other.

        Raises:
            EngineError: no such graph, an input that does not fit it, or a graph that fails.
            BundleError: the graph's file is not what the manifest says.
        """
        spec = signature(graph, self._bundle)
        check_inputs(graph, spec, inputs)
        loaded = self._load(graph)
        with loaded.busy:
            for name, array in inputs.items():
                if loaded.bound.get(name) is not array:
                    self._bind(loaded, name, array)
            try:
                loaded.request.infer()
            except RuntimeError as error:  # a graph may load and still not run: ids out of range
                reason = str(error).strip().splitlines()[-1]
                raise EngineError(f"graph {graph}: openvino cannot run it: {reason}") from error
            # A copy: the request writes its next result to the same place.
            return {
                tensor.name: loaded.request.get_tensor(tensor.name).data.copy()
                for tensor in spec.outputs
            }

    def _bind(self, loaded: _Loaded, name: str, array: NDArray[Any]) -> None:
        """Points an input at an array's own memory, where OpenVINO takes it."""
        loaded.bound.pop(name, None)
        mine = array if array.flags.c_contiguous and array.flags.writeable else array.copy("C")
        loaded.request.set_tensor(name, self._ov.Tensor(mine, shared_memory=True))
        if mine is array:  # a copy would not see what its owner changes: made anew each time
            loaded.bound[name] = array
        else:
            loaded.bound[f"copy of {name}"] = mine  # keeps the memory alive

    def _load(self, graph: str) -> _Loaded:
        with self._loading:
            if graph not in self._loaded:
                self._loaded[graph] = _Loaded(self._compiled(graph).create_infer_request())
            return self._loaded[graph]

    def _compiled(self, graph: str) -> Any:
        """A graph compiled from verified bytes, or taken from the cache of those compiled here."""
        spec = signature(graph, self._bundle)
        content = self._bundle.read(spec)
        quantised = self.precision == "int8" and graph in QUANTISED
        options = self._options(graph)
        device = self.device.upper()
        facts = {
            "engine": "openvino",
            "version": self._ov.get_version(),
            "device": self._core.get_property(device, "FULL_DEVICE_NAME"),
            "capabilities": sorted(self._core.get_property(device, "OPTIMIZATION_CAPABILITIES")),
            "options": options,
            "graph": spec.sha256,
            "rewrites": REWRITES,
            "int8": QUANTISATION if quantised else 0,
        }

        def build() -> bytes:
            model = self._quantised(graph) if quantised else self._core.read_model(content)
            norms_in_one_go(model)
            blob: io.BytesIO = self._core.compile_model(model, device, options).export_model()
            return blob.getvalue()

        try:
            blob = self._cache.load(facts, build, f"{graph} for OpenVINO {self.precision}")
            try:
                return self._core.import_model(io.BytesIO(blob), device, options)
            except RuntimeError as error:
                warnings.warn(f"graph {graph}: openvino refuses its cache: {error}", stacklevel=5)
                return self._core.import_model(io.BytesIO(build()), device, options)
        except RuntimeError as error:  # OpenVINO raises nothing narrower
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(f"graph {graph}: openvino cannot load it: {reason}") from error

    def _options(self, graph: str) -> dict[str, Any]:
        """One stream for the least latency. On a machine of its own OpenVINO takes one thread a
        core and pins each; beside others, pinned threads could not get out of their way."""
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32" if graph in ALWAYS_EXACT else self._between,
            "INFERENCE_NUM_THREADS": 0 if is_whole() else threads(),
            "ENABLE_CPU_PINNING": is_whole(),
        }

    def _quantised(self, graph: str) -> Any:
        """The graph with int8 layers, which `heartbeat-export quantise` put into the cache.

        Raises:
            EngineError: it has not.
        """
        packed = self._cache.get(quantised_facts(self._bundle, graph))
        if packed is None:
            raise EngineError(
                f"engine openvino: no int8 of bundle {self._bundle.manifest.name} on this machine: "
                f"heartbeat-export quantise --bundle {self._bundle.path}"
            )
        length = int.from_bytes(packed[:8], "little")
        weights = np.frombuffer(packed, np.uint8, offset=8 + length)
        return self._core.read_model(packed[8 : 8 + length], self._ov.Tensor(weights.copy()))


def quantised_facts(bundle: Bundle, graph: str) -> dict[str, Any]:
    """What the cache knows a quantised graph by: the bytes of the exact one, and how it was made.

    An entry is 8 bytes length of the XML (little endian), OpenVINO's XML, its weights.
    """
    return {"int8": QUANTISATION, "graph": bundle.manifest.graphs[graph].sha256}


def _precisions(core: Any, device: str) -> tuple[str, ...]:
    """The precisions of a device, the fastest that is not quantised first."""
    has = core.get_property(device, "OPTIMIZATION_CAPABILITIES")
    return tuple(name for name, needed in NEEDS.items() if needed in has)
