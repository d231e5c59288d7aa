"""The plain pass as an engine: nothing is moved out of the loop, as published code runs it.

Every step computes the local features, every layer's keys and values and the time embedding again,
in eager torch. The generator calls `local`, `context` and `time` beforehand all the same; here they
only note what they were given. Text and image encoders run once: nobody runs those at every step.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays, check_inputs, signature
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.models.heartbeat import HeartBeat

LOCAL = ("sketch", "mask", "skeleton", "flow", "present")


class PlainEngine:
    """A model in memory, run as `HeartBeat.predict` would; the clip is TorchEngine's but for
    rounding. One clip at a time: what it noted belongs to the last one encoded."""

    name = "torch, plain pass"
    precision = "fp32"

    def __init__(self, model: HeartBeat, bundle: Bundle, device: str = "cpu") -> None:
        """Raises: EngineError as TorchEngine does."""
        self._hoisted = TorchEngine(model, bundle, device)
        self._model, self._bundle, self.device = model.eval(), bundle, device
        self._noted: dict[str, NDArray[Any]] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Runs one graph; `local`, `context` and `time` are put off until `denoise`.

        Raises:
            EngineError: no such graph, or an input that does not fit it.
        """
        spec = signature(graph, self._bundle)
        if graph == "text":  # the first call of a clip: the last one's local conditions are gone
            self._noted.clear()
        if graph == "denoise":
            check_inputs(graph, spec, inputs)
            return {spec.outputs[0].name: self._denoise(inputs["z"], float(inputs["temb"].flat[0]))}
        if graph not in ("local", "context", "time"):
            return self._hoisted.run(graph, inputs)
        check_inputs(graph, spec, inputs)
        if graph != "time":
            self._noted |= inputs
        # For `time` the embedding's place carries t itself to the step that needs it.
        value = inputs["t"].flat[0] if graph == "time" else 0.0
        return {out.name: np.full(out.shape, value, np.float32) for out in spec.outputs}

    @torch.inference_mode()
    def _denoise(self, z: NDArray[np.float32], t: float) -> NDArray[np.float32]:
        """One step from scratch: z (1,F,C,h,w) to the model's output."""
        given = {k: torch.from_numpy(v).to(self.device) for k, v in self._noted.items()}
        latents, config = torch.from_numpy(z).to(self.device), self._model.config
        if "sketch" in given:
            local = self._model.local_features(*(given[name] for name in LOCAL))
        else:
            channels = config.denoiser.local_channels
            local = latents.new_zeros(1, config.frames, channels, config.latent, config.latent)
        out: NDArray[np.float32] = (
            self._model.denoiser(
                latents,
                torch.tensor([t], device=self.device),
                local,
                given["text_context"],
                given["image_context"],
            )
            .cpu()
            .numpy()
        )
        return out
