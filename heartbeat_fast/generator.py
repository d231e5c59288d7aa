"""Conditions to clip: encode once, step N times, decode once. Only the order of calls is here.

Legend: F frames, C channels, h w latents, N tokens, S steps.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast import __version__
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.clip import Clip, to_grey
from heartbeat_fast.conditions import LOCAL, Conditions
from heartbeat_fast.engines.base import Arrays, Engine, Looping, Resident, open_engine
from heartbeat_fast.errors import ConditionError, EngineError
from heartbeat_fast.reload import Follow
from heartbeat_fast.sampler import SamplerTable, choose, sample
from heartbeat_fast.speckle import stream_of, texture
from heartbeat_fast.stopwatch import Stopwatch as Stopwatch
from heartbeat_fast.text import Tokenizer

STAGES = ("text", "image", "local", "context", "time", "denoise", "decode", "texture")
# Scale of the initial noise. Likeness to the source (SSIM over its ceiling, 8 phantoms) was
# 0.949 at 1, 0.956 at 0.85, 0.961 at 0.7; anatomy from text alone also came out cleaner below 1.
TEMPERATURE = 0.8

Float = NDArray[np.float32]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Encoded:
    """What the loop needs of a clip's conditions.

    Args:
        context: K and V of every cross-attention, by the denoise graph's input names. These and
            local are arrays, or what the engine keeps on its device.
        local: the local features' share of the first convolution, (1,F,C0,h,w).
    """

    context: Arrays
    local: Float


Model = Callable[[Float, int, Encoded], Float]


class Generator:
    """A warm generator: graphs stay loaded, time embeddings and the null context are kept.

    Nothing kept depends on a clip's conditions, so calls never see each other. One that `open` made
    takes up new weights in its bundle's folder between two clips (reload.py).
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self._follow = Follow(bundle, None)
        self._take(bundle, engine)

    def _take(self, bundle: Bundle, engine: Engine) -> None:
        file = bundle.manifest.files["tokenizer"]
        bundle.read(file)  # verifies it
        tokenizer, samplers = Tokenizer.open(bundle.path / file.file), bundle.samplers()
        self.bundle, self.engine = bundle, engine  # nothing above this line was changed on an error
        self._tokenizer, self._samplers = tokenizer, samplers
        self._times: dict[tuple[str, int], list[Float]] = {}
        self._null: Encoded | None = None

    @classmethod
    def open(
        cls, bundle: str | Path | Bundle | None = None, engine: str = "auto", device: str = "cpu"
    ) -> "Generator":
        """Opens a bundle (None: the embedded default) on an engine by name.

        Raises:
            BundleError: not a bundle, or not whole.
            EngineError: the engine is unknown or cannot run here.
        """
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        generator = cls(opened, open_engine(engine, opened, device))
        if engine.partition(":")[0] != "torch":  # that runs a model folder, not the bundle's graphs

            def opener(newer: Bundle) -> Engine:
                return open_engine(engine, newer, device)

            generator._follow = Follow(opened, opener, STAGES[:-1])
        return generator

    def turn(self) -> AbstractContextManager[None]:
        """One clip, for who calls encode, denoise and decode: newer weights come in as it begins,
        and in no thread before it ends. A call of the generator is a turn by itself."""
        return self._follow.clip(self._take)

    def __call__(
        self,
        conditions: Conditions,
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        sampler: str | None = None,
        temperature: float = TEMPERATURE,
        spacing_mm: tuple[float, float] = (1.0, 1.0),
        fps: float = 30.0,
        progress: Progress | None = None,
    ) -> Clip:
        """Makes a clip.

        Args:
            conditions: any subset, for the bundle's frames and size.
            steps: S, one of the counts the bundle has a table for. sampler: its name. By default
                10 of dpmpp_2m; of a distilled bundle's one sampler, the most.
            guidance: weight w of classifier-free guidance (Ho & Salimans, 2207.12598),
                null + w (conditioned − null); 1 costs one model call a step, others two.
            seed: of all noise. Same seed, same engine, same clip.
            temperature: scale of the initial noise; below 1 trades variety for likeness.
            spacing_mm, fps: of the clip, unknown to the model. progress: called with (done, S).

        Returns:
            The clip, frames (F,H,W); its provenance says all of this and `timings_ms`.

        Raises:
            ConditionError: conditions for another number of frames or size, or too long a text.
            SamplerError: the bundle has no such sampler or step count.
            EngineError: guidance, seed or temperature out of range, or no numbers came out.
        """
        if not (np.isfinite(guidance) and guidance >= 0 and 0 <= seed < 2**63):
            raise EngineError(f"guidance {guidance}, seed {seed} came; wanted both 0 or more")
        if not 0 <= temperature <= 2:
            raise EngineError(f"temperature {temperature} came; wanted 0 to 2")
        watch = Stopwatch()
        with self.turn():
            table = choose(self._samplers, sampler, steps)
            encoded = self.encode(conditions, watch)
            z = self.denoise(encoded, table, guidance, seed, watch, progress, temperature)
            frames = self.decode(z, conditions.flow, seed, watch)
            provenance = self._provenance(conditions, watch)
        provenance |= {"sampler": table.name, "steps": table.steps, "guidance": guidance}
        provenance |= {"seed": seed, "temperature": temperature}
        return Clip(frames, spacing_mm, fps, provenance, conditions)

    def _provenance(self, conditions: Conditions, watch: Stopwatch) -> dict[str, Any]:
        """What a clip says of the model, the machine and the conditions."""
        return {
            "version": __version__,
            "bundle": self.bundle.manifest.name,
            "weights": self.bundle.manifest.fingerprints.get("weights", ""),
            "engine": self.engine.name,
            "precision": self.engine.precision,
            "device": self.engine.device,
            "conditions": list(conditions.present),
            "text": conditions.text,
            "ef": conditions.ef,
            "timings_ms": {stage: round(watch.ms.get(stage, 0.0), 3) for stage in STAGES},
        }

    def encode(self, conditions: Conditions, watch: Stopwatch | None = None) -> Encoded:
        """Everything the loop needs of the conditions. Encoders of absent ones do not run.

        Raises:
            ConditionError: conditions for another number of frames or size, or too long a text.
        """
        watch, manifest = watch or Stopwatch(), self.bundle.manifest
        if (conditions.frames, conditions.size) != (manifest.frames, manifest.size):
            raise ConditionError(
                f"conditions: {conditions.frames} frames of {conditions.size} came; bundle "
                f"{manifest.name} wants {manifest.frames} of {manifest.size}"
            )
        arrays: Arrays = dict(conditions.arrays())
        run = self._keep
        with watch("text"):
            arrays["tokens"] = self._tokenizer.encode(conditions.text or "")
            text = run("text", {k: arrays[k] for k in ("tokens", "ef", "present")})
        # An absent condition counts exactly zero, so its graph need not run to find that out.
        with watch("image"):
            image = self._zeros("context", "image_context")
            if "image" in conditions.present:
                image = run("image", {k: arrays[k] for k in ("image", "present")})["image_context"]
        with watch("local"):
            local = self._zeros("denoise", "local")
            if set(LOCAL) & set(conditions.present):
                local = run("local", {k: arrays[k] for k in (*LOCAL, "present")})["local"]
        with watch("context"):
            context = run("context", {**text, "image_context": image})
        return Encoded(context, local)

    def denoise(
        self,
        encoded: Encoded,
        table: SamplerTable,
        guidance: float = 1.0,
        seed: int = 0,
        watch: Stopwatch | None = None,
        progress: Progress | None = None,
        temperature: float = TEMPERATURE,
    ) -> Float:
        """Latents (1,F,C,h,w) from unit noise of this seed, by the table's S steps."""
        watch = watch or Stopwatch()
        model = self.model(table, guidance, watch, progress)
        noise = np.float32(temperature) * self.noise(seed)
        with watch("denoise"):
            if isinstance(self.engine, Looping) and self.engine.loops:
                used = [e for e in (encoded, self._null if guidance != 1.0 else None) if e]
                sets = [{"local": e.local, **e.context} for e in used]
                times = self._time_embeddings(table)
                return self.engine.loop(table, times, sets, guidance, noise, progress)
            return sample(table, lambda z, i: model(z, i, encoded), noise)

    def model(
        self,
        table: SamplerTable,
        guidance: float,
        watch: Stopwatch,
        progress: Progress | None = None,
    ) -> Model:
        """The guided denoiser at a table's times: (z, i, encoded) → output of z's shape."""
        with watch("time"):
            times = self._time_embeddings(table)
        null, manifest = None, self.bundle.manifest
        if guidance != 1.0:
            nothing = Conditions(frames=manifest.frames, size=manifest.size)
            null = self._null = self._null or self.encode(nothing, watch)

        def model(z: Float, i: int, encoded: Encoded) -> Float:
            out = self._out(z, times[i], encoded)
            if null is not None:
                base = self._out(z, times[i], null)
                out = base + np.float32(guidance) * (out - base)
            if progress is not None:
                progress(i + 1, table.steps)
            return out

        return model

    def decode(
        self,
        z: Float,
        flow: NDArray[Any] | None = None,
        seed: int = 0,
        watch: Stopwatch | None = None,
    ) -> NDArray[np.uint8]:
        """Frames (F,H,W) of latents; their speckle is carried along the flow (F,2,H,W) if given.

        Raises:
            EngineError: the latents or frames are not finite.
        """
        watch = watch or Stopwatch()
        return self._frames(z, self._grain(flow, self.bundle.manifest.frames, seed, watch), watch)

    def _grain(self, flow: NDArray[Any] | None, frames: int, seed: int, watch: Stopwatch) -> Float:
        """Texture noise (1,F,2,H,W) of a clip or take."""
        with watch("texture"):
            return texture(flow, frames, self.bundle.manifest.size, stream_of(seed))[None]

    def _frames(self, z: Float, grain: Float, watch: Stopwatch) -> NDArray[np.uint8]:
        with watch("decode"):
            frames = self.engine.run("decode", {"z": z, "noise": grain})["frames"][0, :, 0]
        # Latents too: OpenVINO's clamp makes a finite frame of NaN.
        if not (np.isfinite(z).all() and np.isfinite(frames).all()):
            self._times, self._null = {}, None  # what is kept may hold the NaN
            name = self.engine.name
            raise EngineError(f"engine {name}: frames came out as NaN: try another engine")
        return to_grey(frames)

    def noise(self, seed: int, frames: int = 0) -> Float:
        """Unit noise (1,F,C,h,w), F the bundle's or `frames`. Part of its power is common to all
        frames: those that start apart each settle on a brightness of their own, and flicker."""
        manifest, rng = self.bundle.manifest, np.random.Generator(np.random.PCG64(seed))
        shared = np.float32(manifest.shared_start)
        common = np.sqrt(shared) * rng.standard_normal((1, 1, *manifest.latent), np.float32)
        shape = (1, frames or manifest.frames, *manifest.latent)
        if shared == 1:
            return np.broadcast_to(common, shape)
        return common + np.sqrt(1 - shared) * rng.standard_normal(shape, np.float32)

    def _keep(self, graph: str, inputs: dict[str, Any]) -> dict[str, Any]:
        """A graph's outputs, left on the engine's device where it can: only graphs take them."""
        engine = self.engine
        return (engine.keep if isinstance(engine, Resident) else engine.run)(graph, inputs)

    def _out(self, z: Float, temb: Float, encoded: Encoded) -> Float:
        inputs = {"z": z, "temb": temb, "local": encoded.local, **encoded.context}
        return self.engine.run("denoise", inputs)["out"]

    def _time_embeddings(self, table: SamplerTable) -> list[Float]:
        key = (table.name, table.steps)
        if key not in self._times:
            steps = (np.array([t], np.float32) for t in table.timesteps)
            self._times[key] = [self._keep("time", {"t": t})["temb"] for t in steps]
        return self._times[key]

    def _zeros(self, graph: str, name: str) -> Float:
        """Zeros in the shape of a graph's input."""
        specs = self.bundle.manifest.graphs[graph].inputs
        return np.zeros(next(spec.shape for spec in specs if spec.name == name), np.float32)
