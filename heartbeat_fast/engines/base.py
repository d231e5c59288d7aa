"""What an engine is, which there are, and how one is chosen."""

import warnings
from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle, GraphSpec
from heartbeat_fast.errors import EngineError

Arrays = dict[str, NDArray[Any]]

# Where each engine lives; `auto` takes the first that can run here.
HOMES = {
    "onnxruntime": "heartbeat_fast.engines.onnxruntime_engine:OnnxRuntimeEngine",
    "torch": "heartbeat_fast.engines.torch_engine:TorchEngine",
}
AUTO = ("onnxruntime",)


class Engine(Protocol):
    """Runs the graphs of one bundle on one device."""

    name: str
    precision: str
    device: str

    @staticmethod
    def available() -> tuple[bool, str]:
        """Whether this engine can run here, and why not, or its version and devices."""
        ...

    @classmethod
    def open(cls, bundle: Bundle, device: str, source: str) -> "Engine":
        """Binds the engine to a bundle.

        Args:
            device: "cpu", "cuda", …; each engine says which it knows.
            source: what follows the colon in "torch:FOLDER"; "" for engines that need nothing.

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
    """Opens an engine by name, "name:source", or the best one here by "auto".

    Where `auto` cannot have its first choice, a warning says why and what runs instead.

    Raises:
        EngineError: unknown, or cannot run here.
    """
    name, _, source = choice.partition(":")
    if name != "auto":
        kind = engine_class(name)
        can, why = kind.available()
        if not can:
            raise EngineError(f"engine {name} cannot run here: {why}")
        return kind.open(bundle, device, source)
    reasons: list[str] = []
    for candidate in AUTO:
        kind = engine_class(candidate)
        can, why = kind.available()
        if can:
            if reasons:
                warnings.warn(f"{'; '.join(reasons)}: using {candidate}", stacklevel=2)
            return kind.open(bundle, device, "")
        reasons.append(f"engine {candidate} cannot run here: {why}")
    raise EngineError("; ".join(reasons))


def check_inputs(name: str, graph: GraphSpec, inputs: Mapping[str, NDArray[Any]]) -> None:
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
