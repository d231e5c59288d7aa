"""A generator with a memory: what did not change is not encoded again, a clip starts from the last.

One `Warm` serves any number of sessions; what belongs to one of them is in its `Memory`.
Legend: F frames, C channels, h w latents, S steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.carry import resume
from heartbeat_fast.conditions import LOCAL, Conditions
from heartbeat_fast.engines.base import Arrays
from heartbeat_fast.generator import (
    TEMPERATURE,
    Encoded,
    Float,
    Generator,
    Progress,
    Stopwatch,
)
from heartbeat_fast.sampler import SamplerTable, choose

# Which conditions each encoder reads. It sees the flags of its own ones only.
GROUPS: dict[str, tuple[str, ...]] = {"text": ("text", "ef"), "image": ("image",), "local": LOCAL}


@dataclass
class Memory:
    """What one session keeps from clip to clip: encodings by their stamps, and the last latents."""

    kept: dict[str, tuple[Any, Arrays]] = field(default_factory=dict)
    latents: Float | None = None
    weights: str = ""

    def forget(self) -> None:
        """After a fault, or when the weights were replaced: nothing kept can be trusted."""
        self.kept.clear()
        self.latents = None


class Warm(Generator):
    """A generator whose stages a session calls one by one."""

    @classmethod
    def of(cls, generator: Generator) -> "Warm":
        """The same generator with these methods: one state, so both take up new weights at once."""
        if isinstance(generator, cls):
            return generator
        warm = cls.__new__(cls)
        warm.__dict__ = generator.__dict__
        return warm

    def table(self, sampler: str | None, steps: int | None) -> SamplerTable:
        """The bundle's table of a sampler; None picks what suits it.

        Raises:
            SamplerError: there is none.
        """
        return choose(self._samplers, sampler, steps)

    def provenance(self, conditions: Conditions, watch: Stopwatch) -> dict[str, Any]:
        """What a clip says of the model, the machine and the conditions."""
        return self._provenance(conditions, watch)

    def check_text(self, text: str) -> None:
        """Raises: ConditionError: more tokens than the text encoder takes."""
        self._tokenizer.encode(text)

    def encode_changed(
        self,
        values: Mapping[str, Any],
        stamps: Mapping[str, int],
        memory: Memory,
        watch: Stopwatch | None = None,
    ) -> Encoded:
        """As `encode`, running only the graphs whose conditions have another stamp than before.

        Args:
            values: conditions by name, None where absent.
            stamps: a number for each of GROUPS, another one whenever one of its values changed.
        """
        watch = watch or Stopwatch()
        manifest = self.bundle.manifest
        weights = manifest.fingerprints.get("weights", "")
        if memory.weights != weights:
            memory.forget()
            memory.weights = weights

        def outputs(graph: str) -> Arrays:
            group = {name: values[name] for name in GROUPS[graph] if values.get(name) is not None}
            arrays: Arrays = dict(
                Conditions(**group, frames=manifest.frames, size=manifest.size).arrays()
            )
            if graph == "text":
                arrays["tokens"] = self._tokenizer.encode(values.get("text") or "")
            elif not group:  # worth exactly zero
                out = ("context", "image_context") if graph == "image" else ("denoise", "local")
                return {out[1]: self._zeros(*out)}
            names = [spec.name for spec in manifest.graphs[graph].inputs]
            return self.engine.run(graph, {name: arrays[name] for name in names})

        for graph in GROUPS:
            if memory.kept.get(graph, (None,))[0] != stamps[graph]:
                with watch(graph):
                    memory.kept[graph] = stamps[graph], outputs(graph)
        stamp = stamps["text"], stamps["image"]
        if memory.kept.get("context", (None,))[0] != stamp:
            tokens = memory.kept["text"][1] | memory.kept["image"][1]
            with watch("context"):
                memory.kept["context"] = stamp, self.engine.run("context", tokens)
        return Encoded(memory.kept["context"][1], memory.kept["local"][1]["local"])

    def resume(
        self,
        encoded: Encoded,
        table: SamplerTable,
        latents: Float,
        start: int,
        guidance: float = 1.0,
        seed: int = 0,
        watch: Stopwatch | None = None,
        progress: Progress | None = None,
        temperature: float = TEMPERATURE,
    ) -> Float:
        """As `denoise`, from step `start` on, from latents (1,F,C,h,w) noised to its level."""
        watch = watch or Stopwatch()
        model = self.model(table, guidance, watch, progress)
        noise = np.float32(temperature) * self.noise(seed)
        with watch("denoise"):
            return resume(table, lambda z, i: model(z, i, encoded), latents, noise, start)

    def decode_long(
        self, z: Float, flow: NDArray[Any] | None, seed: int, watch: Stopwatch
    ) -> NDArray[np.uint8]:
        """Frames (L,H,W) of a take's latents (1,L,C,h,w); the decoder sees F of them at a time.

        Raises:
            EngineError: frames are not finite.
        """
        manifest, L = self.bundle.manifest, z.shape[1]
        grain = self._grain(flow, L, seed, watch)
        out = np.empty((L, manifest.size, manifest.size), np.uint8)
        for start in [*range(0, L - manifest.frames, manifest.frames), L - manifest.frames]:
            part = slice(start, start + manifest.frames)
            out[part] = self._frames(
                np.ascontiguousarray(z[:, part]), np.ascontiguousarray(grain[:, part]), watch
            )
        return out
