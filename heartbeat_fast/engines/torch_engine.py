"""Plain torch: the reference every other engine is held to.

It opens a HeartBeat model folder ("torch:FOLDER"), not the bundle's ONNX files; the bundle still
brings tokenizer and sampler tables. Torch itself is imported on first use, so that `heartbeat
doctor` can say that it is missing.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays, check_inputs, signature
from heartbeat_fast.errors import EngineError, MissingDependency, optional

if TYPE_CHECKING:
    from heartbeat_fast.models.heartbeat import HeartBeat


class TorchEngine:
    """Runs the same graphs as the bundle, as torch modules with the bundle's weights."""

    name = "torch"
    precision = "fp32"

    def __init__(self, model: "HeartBeat", bundle: Bundle, device: str = "cpu") -> None:
        """Takes a model in memory; its weights are rounded in place as the bundle stores them.

        Raises:
            EngineError: no such device, or the model is of another shape than the bundle.
        """
        torch = optional("torch", "models")
        from heartbeat_fast.models.graphs import build_graphs, round_to_half

        manifest, config = bundle.manifest, model.config
        came = (config.name, config.frames, config.size)
        wanted = (manifest.preset, manifest.frames, manifest.size)
        if came != wanted:
            raise EngineError(
                f"engine torch: model {came} came; bundle {manifest.name} wants {wanted}"
            )
        try:
            self._graphs = build_graphs(round_to_half(model.to(device)))
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises either
            raise EngineError(f"device: {device!r} came; torch says {error}") from error
        self._torch, self._bundle, self.device = torch, bundle, device

    @staticmethod
    def available() -> tuple[bool, str]:
        """Whether torch and the model libraries import, and torch's version and devices."""
        try:
            torch = optional("torch", "models")
            for library in ("diffusers", "transformers"):
                optional(library, "models")
        except MissingDependency as error:
            return False, str(error)
        return True, f"{torch.__version__}: cpu{', cuda' if torch.cuda.is_available() else ''}"

    @staticmethod
    def precisions() -> tuple[str, ...]:
        """fp32, as the reference."""
        return ("fp32",)

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cpu", source: str = "") -> "TorchEngine":
        """Loads the model folder `source`.

        Raises:
            EngineError: no folder given, or one of another shape than the bundle.
        """
        if not source:
            raise EngineError("engine torch runs a model folder, not a bundle: torch:FOLDER")
        from heartbeat_fast.models.heartbeat import HeartBeat

        return cls(HeartBeat.from_pretrained(source), bundle, device)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs one graph.

        Raises:
            EngineError: no such graph, or an input that does not fit it.
        """
        check_inputs(graph, signature(graph, self._bundle), inputs)
        found = self._graphs[graph]
        with self._torch.inference_mode():
            tensors = (self._torch.from_numpy(inputs[key]).to(self.device) for key in found.inputs)
            values = found.module(*tensors)
        values = values if isinstance(values, tuple) else (values,)
        return {k: v.cpu().numpy() for k, v in zip(found.outputs, values, strict=True)}
