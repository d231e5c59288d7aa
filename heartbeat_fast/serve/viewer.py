"""One viewer's stream: controls come in, a warm session makes clips of them, frames go out.

Latest wins on both sides: controls that were overtaken are never sampled, and a frame that a slow
viewer could not take is left out and counted, never queued.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.controls import Settings
from heartbeat_fast.errors import ConditionError, HeartBeatError
from heartbeat_fast.generator import Generator
from heartbeat_fast.playback import Frame
from heartbeat_fast.serve.messages import frame_message
from heartbeat_fast.serve.scene import Controls, scene
from heartbeat_fast.stream import Cancelled, Session

RATE = 25.0  # frames a second to each viewer
ON_THE_WAY = 2  # frames that a viewer who says what it has seen can have unseen
# Share of the steps that a changed clip takes over from the last one. Of myocardium painted as
# cavity, 4 steps took 13 grey levels away at 0.5, 19 at 0.25, 24 at 0 (tiny): strokes must show.
CARRY = 0.25
KEPT = 16  # overlays of versions that are on their way to the screen, a megabyte each at 256

Send = Callable[[Any], Awaitable[None]]


@dataclass(frozen=True, eq=False)
class Shown:
    """What a session's version shows: the viewer's revision, overlay (F,H,W), scale, conditions."""

    revision: int
    overlay: NDArray[np.uint8]
    spacing_mm: tuple[float, float]
    present: tuple[str, ...]


class Viewer:
    """Frames of one viewer.

    Args:
        generator: shared by all viewers.
        say: sends a JSON message. show: sends a binary frame, and returns when it was taken.
    """

    def __init__(self, generator: Generator, controls: Controls, say: Send, show: Send) -> None:
        manifest = generator.bundle.manifest
        self.frames, self.size = manifest.frames, manifest.size
        self._generator, self._say, self._show = generator, say, show
        self._controls, self._revision = controls, 0
        self._changed = asyncio.Event()
        self._changed.set()
        self._sent = 0  # frames
        self._seen: int | None = None  # the last one the viewer says it has shown, if it says so
        self._saw = asyncio.Event()
        self._session: Session | None = None
        self._opened = asyncio.Event()
        self._shown: dict[int, Shown] = {}  # by the session's versions

    def tell(self, message: Any) -> None:
        """Takes a message of the viewer: any fields of Controls, and `revision`, its own count.

        Or `seen`, the number of the last frame it has shown: then no more than ON_THE_WAY follow
        it, and what socket buffers would hoard is never sent.

        Raises:
            ConditionError: names the field, what came, and what is wanted.
        """
        if not isinstance(message, dict):
            raise ConditionError(f"message: {type(message).__name__} came; wanted a JSON object")
        fields = dict(message)
        if "seen" in fields:
            self._seen = _whole("seen", fields.pop("seen"))
            self._saw.set()
            if not fields:
                return
        revision = _whole("revision", fields.pop("revision", self._revision + 1))
        self._controls = self._controls.updated(fields, self.frames, self.size)
        self._revision = revision
        self._changed.set()

    async def run(self) -> None:
        """Steers and plays until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._steer())
                tasks.create_task(self._play())
        finally:
            if (session := self._session) is not None:
                await asyncio.shield(asyncio.to_thread(session.close))

    async def _steer(self) -> None:
        """Puts the newest controls into the session."""
        settings: Settings | None = None
        while True:
            await self._changed.wait()
            self._changed.clear()
            controls, revision = self._controls, self._revision
            try:
                made = await asyncio.to_thread(scene, controls, self.frames, self.size)
                how = controls.steps, controls.sampler, controls.guidance
                wanted = Settings(*how, carry=CARRY)
                values: dict[str, Any] = {n: getattr(made.conditions, n) for n in NAMES}
                values |= {"heart_rate": controls.heart_rate, "seed": controls.seed}
                if wanted != settings or self._session is None:
                    await self._reopen(wanted)
                    settings = wanted
                assert self._session is not None
                version = await asyncio.to_thread(self._session.set, **values)
            except HeartBeatError as error:
                await self._say({"kind": "error", "error": str(error), "revision": revision})
                continue
            present = made.conditions.present
            self._shown[version] = Shown(revision, made.overlay(), made.spacing_mm, present)
            while len(self._shown) > KEPT:
                del self._shown[min(self._shown)]
            self._opened.set()

    async def _reopen(self, settings: Settings) -> None:
        """A session's way of sampling is fixed: another way is another session."""
        session = await asyncio.to_thread(Session, self._generator, settings)
        old, self._session = self._session, session
        self._opened.clear()
        self._shown.clear()
        if old is not None:
            await asyncio.to_thread(old.close)

    async def _play(self) -> None:
        dropped, due = 0, time.monotonic()
        playing: Session | None = None
        while True:
            await self._opened.wait()
            session = self._session
            assert session is not None
            try:
                # A session's first frame is waited for, on a thread; later ones are there already.
                ready = session is playing
                frame = session.frame() if ready else await asyncio.to_thread(session.frame)
            except Cancelled:
                continue  # the session was replaced meanwhile
            except HeartBeatError as error:
                await self._say({"kind": "error", "error": str(error)})
                await asyncio.sleep(1)
                continue
            if session is not self._session:
                continue
            playing = session
            self._sent += 1
            await self._show(self._message(session, frame, dropped))
            while self._seen is not None and self._sent - self._seen >= ON_THE_WAY:
                self._saw.clear()
                await self._saw.wait()
            due += 1 / RATE
            late = time.monotonic() - due
            if late > 0:
                dropped += int(late * RATE) if ready else 0
                due += int(late * RATE) / RATE
            await asyncio.sleep(max(0.0, -late))

    def _message(self, session: Session, frame: Frame, dropped: int) -> bytes:
        shown = self._shown.get(frame.version) or next(iter(self._shown.values()))
        beat = max(self.frames - 1, 1)  # a whole beat's last frame is the next one's first
        index = int(frame.phase * beat) % beat
        engine, settings = self._generator.engine, session.settings
        manifest = session.manifest
        latency = session.stats.latencies[-1] if session.stats.latencies else None
        fault = session.fault
        header = {
            "kind": "frame",
            "planes": ["grey", "overlay"],
            "height": self.size,
            "width": self.size,
            "frame": index,
            "frames": beat,
            "phase": round(frame.phase, 4),
            "number": self._sent,
            "time": frame.time,
            "revision": shown.revision,
            "making": session.wish.version != frame.version,
            "latency_ms": None if latency is None else round(latency * 1e3, 1),
            "clips": session.stats.clips,
            "dropped": dropped,
            "spacing_mm": shown.spacing_mm,
            "conditions": shown.present,
            "bundle": manifest.name,
            "weights": manifest.fingerprints.get("weights", ""),
            "engine": engine.name,
            "precision": engine.precision,
            "sampler": settings.sampler,
            "steps": settings.steps,
            "fault": None if fault is None else str(fault),
            "synthetic": True,
        }
        return frame_message(header, frame.pixels, shown.overlay[index])


def _whole(name: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ConditionError(f"{name}: {value!r:.40} came; wanted a whole number")
    return value


async def serve_viewer(viewer: Viewer, listen: Awaitable[None]) -> list[BaseException]:
    """Runs a viewer until it goes or listening ends; gives what ended it, if an error did."""
    tasks = [asyncio.ensure_future(viewer.run()), asyncio.ensure_future(listen)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            done = await asyncio.gather(*tasks, return_exceptions=True)
    return [error for error in done if isinstance(error, Exception)]
