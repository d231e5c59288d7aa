"""What an engine is, which there are, and how one is chosen."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle, GraphSpec
from heartbeat_fast.errors import EngineError
from heartbeat_fast.sampler import SamplerTable

Arrays = dict[str, NDArray[Any]]

# Where each engine lives. What `auto` tries, and in which order, is in auto.py.
HOMES = {
    "openvino": "heartbeat_fast.engines.openvino_engine:OpenVinoEngine",
    "onnxruntime": "heartbeat_fast.engines.onnxruntime_engine:OnnxRuntimeEngine",
    "torch": "heartbeat_fast.engines.torch_engine:TorchEngine",
    "tensorrt": "heartbeat_fast.engines.tensorrt_engine:TensorRtEngine",
    "tensorrt_rtx": "heartbeat_fast.engines.tensorrt_rtx_engine:TensorRtRtxEngine",
}


class Engine(Protocol):
    """Runs the graphs of one bundle on one device.

    Inputs may be bound without a copy: who changes an array in place while `run` is under way
    changes the result. What `run` returns is the caller's.
    """

    name: str
    precision: str
    device: str

    @staticmethod
    def available() -> tuple[bool, str]:
        """Whether this engine can run here, and why not, or its version and devices."""
        ...

    @staticmethod
    def precisions() -> tuple[str, ...]:
        """What can follow the colon as a precision here, the default first; () if unavailable."""
        ...

    @classmethod
    def open(cls, bundle: Bundle, device: str, source: str) -> "Engine":
        """Binds the engine to a bundle.

        Args:
            device: "cpu", "cuda", …; each engine says which it knows.
            source: what follows the first colon: a precision ("openvino:bf16"), a model folder
                ("torch:FOLDER"); "" for the engine's default.

        Raises:
            EngineError: the device or source is not usable here.
        """
        ...

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs a graph; inputs and outputs by the names, dtypes and shapes of its signature.

        Raises:
            EngineError: an input does not fit the signature.
        """
        ...


@runtime_checkable
class Resident(Protocol):
    """An engine that can leave a graph's outputs on its device, for later graphs to take."""

    def keep(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As Engine.run, but the outputs stay on the device; `run` and `keep` take them as inputs.

        They have `shape` and `dtype` as arrays have.
        """
        ...


@runtime_checkable
class Looping(Protocol):
    """An engine that can run a whole sampler table on its device; `loops` says if it should."""

    loops: bool

    def loop(
        self,
        table: SamplerTable,
        times: list[Any],
        conditions: Sequence[Mapping[str, Any]],
        guidance: float,
        noise: NDArray[Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[Any]:
        """The latents that sampler.sample gives of `noise`.

        Args:
            times: temb of every step.  conditions: the denoise graph's other inputs (local, kv_…)
                by name: of the conditions; with guidance other than 1 also of none.
            guidance: null + w (conditioned − null).
            progress: called with (steps done or queued, S).
        """
        ...


def names() -> tuple[str, ...]:
    """The engines this release knows."""
    return tuple(HOMES)


def engine_class(name: str) -> type[Engine]:
    """The class of an engine by name; needs none of its libraries.

    Raises:
        EngineError: no such engine; lists those there are.
    """
    if name not in HOMES:
        raise EngineError(f"engine: {name!r} came; wanted auto, {', '.join(names())}")
    module, _, attribute = HOMES[name].partition(":")
    found: type[Engine] = getattr(import_module(module), attribute)
    return found


def open_engine(choice: str, bundle: Bundle, device: str = "cpu") -> Engine:
    """Opens an engine by name, "name:source", or by "auto" the fastest that passed parity here.

    Where `auto` cannot use an engine that is installed, a warning says why and what runs instead.

    Raises:
        EngineError: unknown, or cannot run here.
    """
    name, _, source = choice.partition(":")
    if name == "auto":
        from heartbeat_fast.engines.auto import open_fastest  # it opens engines by this function

        return open_fastest(bundle, device)
    kind = engine_class(name)
    can, why = kind.available()
    if not can:
        raise EngineError(f"engine {name} cannot run here: {why}")
    return kind.open(bundle, device, source)


def check_inputs(name: str, graph: GraphSpec, inputs: Mapping[str, Any]) -> None:
    """Compares inputs with a graph's signature before anything runs.

    Raises:
        EngineError: names the graph and the input, what came, what is wanted.
    """
    wanted = {spec.name: spec for spec in graph.inputs}
    if odd := sorted(wanted.keys() ^ inputs.keys()):
        state = "unknown" if odd[0] in inputs else "missing"
        raise EngineError(f"graph {name}: input {odd[0]} is {state}; wanted {', '.join(wanted)}")
    for key, spec in wanted.items():
        array = inputs[key]
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise EngineError(
                f"graph {name}: input {key} is {array.dtype} {array.shape}; "
                f"wanted {spec.dtype} {spec.shape}"
            )


def signature(name: str, bundle: Bundle) -> GraphSpec:
    """A graph's entry in the manifest.

    Raises:
        EngineError: the bundle has no such graph.
    """
    graphs = bundle.manifest.graphs
    if name not in graphs:
        raise EngineError(f"graph: {name!r} came; the bundle has {', '.join(graphs)}")
    return graphs[name]
