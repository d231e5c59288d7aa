"""Plain torch: the reference every other engine is held to; on a GPU also one of the fastest.

It opens a HeartBeat model folder ("torch:FOLDER"), not the bundle's ONNX files; the bundle still
brings tokenizer and sampler tables. Options stand before the folder: "torch:bf16:graph:FOLDER".

    fp32, bf16, fp16   what is computed in; the time embedding is fp32 always
    eager              as the model is written: the reference
    compiled           torch.compile, graph by graph, on first use
    graph              CUDA only: Triton kernels, and a clip's sampling as one captured CUDA graph

Torch itself is imported on first use, so that `heartbeat doctor` can say that it is missing.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays, check_inputs, signature
from heartbeat_fast.errors import EngineError, MissingDependency, optional
from heartbeat_fast.sampler import SamplerTable

if TYPE_CHECKING:
    from heartbeat_fast.models.heartbeat import HeartBeat

PRECISIONS = ("fp32", "bf16", "fp16")
MODES = ("eager", "compiled", "graph")


class TorchEngine:
    """Runs the same graphs as the bundle, as torch modules with the bundle's weights."""

    name = "torch"

    def __init__(
        self,
        model: "HeartBeat",
        bundle: Bundle,
        device: str = "cpu",
        precision: str = "fp32",
        mode: str = "eager",
    ) -> None:
        """Takes a model in memory; its weights are rounded in place as the bundle stores them, and
        cast in place where precision is not fp32.

        Raises:
            EngineError: no such device, precision or mode, or a model of another shape.
        """
        torch = optional("torch", "models")
        from heartbeat_fast.models.graphs import round_to_half

        manifest, config = bundle.manifest, model.config
        came = (config.name, config.frames, config.size)
        wanted = (manifest.preset, manifest.frames, manifest.size)
        if came != wanted:
            raise EngineError(
                f"engine torch: model {came} came; bundle {manifest.name} wants {wanted}"
            )
        if precision not in PRECISIONS or mode not in MODES:
            known = ", ".join((*PRECISIONS, *MODES))
            raise EngineError(f"engine torch: {precision}, {mode} came; wanted of {known}")
        if mode == "graph" and not device.startswith("cuda"):
            raise EngineError(f"engine torch: no CUDA graph on {device}: leave out graph")
        try:
            round_to_half(model.to(device))
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises either
            raise EngineError(f"device: {device!r} came; torch says {error}") from error
        self._torch, self._bundle, self._mode = torch, bundle, mode
        self.device, self.precision = device, precision
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            precision
        ]
        self._build(model)
        self.loops = mode == "graph"
        self._loops: dict[tuple[int, ...], Any] = {}
        self._busy = threading.Lock()

    def _build(self, model: "HeartBeat") -> None:
        """Every fast choice in one place; the model knows of none."""
        from heartbeat_fast.models.blocks import use_kernels
        from heartbeat_fast.models.exact_time import ExactTime
        from heartbeat_fast.models.graphs import build_graphs

        # Sinusoids of t = 500 lose most of their digits in half precision.
        time = ExactTime(model.denoiser) if self.precision != "fp32" else None
        self._graphs = build_graphs(model.to(self._dtype))
        self._modules: dict[str, Callable[..., Any]] = {
            name: graph.module for name, graph in self._graphs.items()
        }
        if time is not None:
            self._modules["time"] = time
        if self._mode == "graph":
            use_kernels(model, "triton")
        if self._mode == "compiled":
            for name, module in self._modules.items():
                self._modules[name] = self._torch.compile(module, dynamic=False)

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
        """All of them: torch computes in each on every device, if not always fast."""
        return PRECISIONS

    @classmethod
    def open(cls, bundle: Bundle, device: str = "cpu", source: str = "") -> "TorchEngine":
        """Loads a model folder; `source` is options and the folder, joined by colons.

        Raises:
            EngineError: no folder given, or one of another shape than the bundle.
        """
        options, folder = parse(source)
        if not folder:
            raise EngineError("engine torch runs a model folder, not a bundle: torch:FOLDER")
        from heartbeat_fast.models.heartbeat import HeartBeat

        return cls(HeartBeat.from_pretrained(folder), bundle, device, **options)

    def run(self, graph: str, inputs: Mapping[str, Any]) -> Arrays:
        """Runs one graph; inputs may be what `keep` returned.

        Raises:
            EngineError: no such graph, or an input that does not fit it.
        """
        return {name: value.cpu().numpy() for name, value in self._tensors(graph, inputs).items()}

    def keep(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """As run, but the outputs stay on the device, for later graphs to take. On the CPU, where
        there is nothing to save, they are arrays.

        Raises:
            EngineError: as run.
        """
        if self.device == "cpu":
            return dict(self.run(graph, inputs))
        return {name: Kept(value) for name, value in self._tensors(graph, inputs).items()}

    def loop(
        self,
        table: SamplerTable,
        times: list[Any],
        conditions: Sequence[Mapping[str, Any]],
        guidance: float,
        noise: NDArray[Any],
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[Any]:
        """Runs a whole sampler table on the device (base.Looping).

        Nothing is read back before the last step. An absent image, whose values are zero and add
        exactly nothing, is left out of the pass, so there is one captured graph per step count,
        number of condition sets and presence of an image.
        """
        from heartbeat_fast.models.sampling_loop import Loop, condition_sets

        with self._busy, self._torch.inference_mode():
            tensors = [{k: self._tensor(v) for k, v in each.items()} for each in conditions]
            sets = condition_sets(tensors, self._graphs["denoise"].inputs)
            embedded = self._torch.cat([self._tensor(value) for value in times])
            key = (table.steps, *map(len, sets))
            if key not in self._loops:
                self._loops[key] = Loop(
                    self._modules["denoise"], self._dtype, table.steps, sets, self.loops
                )
            start = self._tensor(noise)
            z = self._loops[key].run(table, embedded, sets, guidance, start, progress)
            result: NDArray[Any] = z.cpu().numpy()
            return result

    def _tensors(self, graph: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """A graph's outputs on the device, float32 as its signature says."""
        check_inputs(graph, signature(graph, self._bundle), inputs)
        found = self._graphs[graph]
        with self._torch.inference_mode():
            tensors = [self._tensor(inputs[name]) for name in found.inputs]
            if graph != "time":
                tensors = [t.to(self._dtype) if t.is_floating_point() else t for t in tensors]
            values = self._modules[graph](*tensors)
            values = values if isinstance(values, tuple) else (values,)
            return {k: v.float() for k, v in zip(found.outputs, values, strict=True)}

    def _tensor(self, value: Any) -> Any:
        """An input on the device, without a copy where it is there."""
        if isinstance(value, Kept):
            return value.tensor
        return self._torch.from_numpy(np.ascontiguousarray(value)).to(self.device)


class Kept:
    """A graph's output that stays on the device."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor
        self.shape, self.dtype = tuple(tensor.shape), np.dtype(np.float32)


def parse(source: str) -> tuple[dict[str, str], str]:
    """ "bf16:graph:FOLDER" to ({"precision": "bf16", "mode": "graph"}, "FOLDER")."""
    options: dict[str, str] = {}
    while source:
        first, colon, rest = source.partition(":")
        key = "precision" if first in PRECISIONS else "mode" if first in MODES else ""
        if not key or not colon:
            break
        options[key], source = first, rest
    return options, source
