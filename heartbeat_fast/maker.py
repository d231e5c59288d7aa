"""One wish to one clip: the order of a warm generator's calls, and what goes wrong in them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import Anatomy
from heartbeat_fast.carry import levels
from heartbeat_fast.clip import Clip
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.controls import Settings, Wish
from heartbeat_fast.errors import EngineError, HeartBeatError
from heartbeat_fast.generator import Float, Generator, Stopwatch
from heartbeat_fast.heart import Beat, beat
from heartbeat_fast.playback import Loop
from heartbeat_fast.sampler import SamplerError
from heartbeat_fast.warm import Memory, Warm


@dataclass(frozen=True, eq=False)
class Made:
    """A clip, the same as a loop, and the time of the wish it fulfils (steady clock)."""

    clip: Clip
    loop: Loop
    at: float


class Maker:
    """Makes one session's clips, each from the one before.

    Raises:
        SamplerError: the bundle has no such sampler or step count.
    """

    def __init__(self, generator: Generator, settings: Settings) -> None:
        self.warm, self.settings = Warm.of(generator), settings
        self._table = self.warm.table(settings.sampler, settings.steps)
        self._memory = Memory()
        self._beat: tuple[Anatomy, Beat] | None = None
        self._beats = 0
        self._patient: int | None = None

    def make(self, wish: Wish, check: Callable[[], None]) -> Made:
        """A clip of a wish.

        Args:
            check: called between steps; whatever it raises ends the work and comes out.

        Raises:
            EngineError: the engine failed in any way, or put out no numbers; nothing of it is kept.
            ConditionError: the wish cannot be fulfilled.
        """
        try:
            with self.warm.turn():  # new weights come in between clips
                self._table = self.warm.table(self.settings.sampler, self.settings.steps)
                return self._make(wish, check)
        except EngineError:
            self._memory.forget()
            raise
        except HeartBeatError:
            raise
        except Exception as error:  # engines raise their own libraries' classes
            self._memory.forget()
            reason = (str(error).splitlines() or [""])[0]
            raise EngineError(
                f"engine {self.warm.engine.name}: failed ({type(error).__name__}: {reason}): "
                "the next clip starts anew"
            ) from error

    def _make(self, wish: Wish, check: Callable[[], None]) -> Made:
        watch, memory, settings = Stopwatch(), self._memory, self.settings
        values: dict[str, Any] = dict(wish.values)
        spacing, fps = settings.spacing_mm, settings.fps
        patient = None if wish.anatomy is None else wish.anatomy.seed
        if patient != self._patient:  # another heart does not start from this one's latents
            self._patient, memory.latents = patient, None
        if (heart := wish.heart()) is not None:
            with watch("anatomy"):
                moving = self._moving(heart)
            values |= {"mask": moving.mask, "skeleton": moving.skeleton, "flow": moving.flow}
            values["ef"] = 100 * heart.ef
            spacing, fps = moving.spacing_mm, moving.fps
        check()
        encoded = self.warm.encode_changed(values, wish.stamps, memory, watch)
        check()
        seed = (wish.seed + self._beats) % 2**63 if settings.vary else wish.seed
        start = self._start(memory.latents)
        options: dict[str, Any] = {
            "guidance": settings.guidance,
            "seed": seed,
            "watch": watch,
            "progress": lambda done, of: check(),
            "temperature": settings.temperature,
        }
        if memory.latents is None or not start:
            latents = self.warm.denoise(encoded, self._table, **options)
        else:
            latents = self.warm.resume(encoded, self._table, memory.latents, start, **options)
        frames = self.warm.decode(latents, values.get("flow"), seed, watch)
        memory.latents = latents
        self._beats += 1
        return self._made(wish, values, frames, watch, start, seed, spacing, fps)

    def _start(self, latents: Float | None) -> int:
        """The step a clip starts from; 0 is anew, as with tables that nobody can start within."""
        if latents is None or not np.isfinite(latents).all():
            return 0
        try:
            steps = len(levels(self._table))
        except SamplerError:
            return 0
        return min(round(self.settings.carry * steps), steps - 1)

    def _moving(self, heart: Anatomy) -> Beat:
        if self._beat is None or self._beat[0] != heart:
            manifest = self.warm.bundle.manifest
            self._beat = heart, beat(heart, manifest.frames, manifest.size)
        return self._beat[1]

    def _made(
        self,
        wish: Wish,
        values: dict[str, Any],
        frames: NDArray[np.uint8],
        watch: Stopwatch,
        start: int,
        seed: int,
        spacing: tuple[float, float],
        fps: float,
    ) -> Made:
        manifest = self.warm.bundle.manifest
        conditions = Conditions(**values, frames=manifest.frames, size=manifest.size)
        provenance = self.warm.provenance(conditions, watch) | {
            "heart_rate": wish.heart_rate,
            "sampler": self._table.name,
            "steps": self._table.steps,
            "carried_steps": start,
            "guidance": self.settings.guidance,
            "temperature": self.settings.temperature,
            "seed": seed,
            "session_version": wish.version,
        }
        provenance["timings_ms"]["anatomy"] = round(watch.ms.get("anatomy", 0.0), 3)
        clip = Clip(frames, spacing, fps, provenance, conditions)
        loop = Loop.of(frames, conditions, wish.version, time.time())
        return Made(clip, loop, wish.at)
