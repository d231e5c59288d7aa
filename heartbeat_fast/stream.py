"""A warm session: change any condition at any time; get the next clip, or frames at a steady rate.

The next clip is generated while this one plays, from its latents, so that the heart shown changes
and does not jump. Newer changes replace older ones that were not begun. A host without masks steers
an anatomy by ejection fraction and heart rate. Legend: F frames, H W pixels.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from threading import Condition, Lock, Thread
from typing import Any

from heartbeat_fast.bundle import Manifest
from heartbeat_fast.clip import Clip
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.controls import Settings, Wish, check_control, host_array
from heartbeat_fast.errors import ConditionError, HeartBeatError
from heartbeat_fast.generator import Generator
from heartbeat_fast.maker import Made, Maker
from heartbeat_fast.playback import Frame, Player

RETRY, LONGEST_RETRY = 1.0, 30.0  # seconds after a fault; doubled each time, up to the second


class Cancelled(HeartBeatError):
    """A clip was given up between two steps: newer conditions came, or the session was closed."""


class DeadlineError(HeartBeatError):
    """A clip was not ready in time; what was begun was given up between two steps."""


@dataclass
class Stats:
    """What a session counts; latencies are seconds from a change to its first frame."""

    clips: int = 0
    cancelled: int = 0
    faults: int = 0
    missed: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=1000))


class Session:
    """One simulated patient: conditions go in, clips or frames come out.

    `next` generates in the caller's thread. `frame` and `frames` start a thread of the session's
    own, which `close` ends. All methods may be called from any thread.

    Args:
        generator: shared by any number of sessions.
        controls: any of controls.CONTROLS, as `set` takes them.

    Raises:
        SamplerError: the bundle has no such sampler or step count.
        ConditionError: a control is wrong.
    """

    def __init__(
        self, generator: Generator, settings: Settings | None = None, **controls: Any
    ) -> None:
        self.settings = settings or Settings()
        self.stats = Stats()
        self.fault: HeartBeatError | None = None
        self._maker = Maker(generator, self.settings)
        self._wish, self._player = Wish(), Player(fade=self.settings.fade)
        self._lock, self._making = Condition(), Lock()
        self._thread: Thread | None = None
        self._closed = False
        self._begun = -1  # the version last begun
        self._last: Made | None = None
        self._ready: Made | None = None  # made and not shown yet: one, the latest
        self._overdue: float | None = None  # since when a change has waited for its clip
        self._retry, self._wait = math.inf, RETRY
        self.set(**controls)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def wish(self) -> Wish:
        """The latest conditions and controls."""
        return self._wish

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that is run now."""
        return self._maker.warm.bundle.manifest

    @property
    def spacing_mm(self) -> tuple[float, float]:
        """Of the clip made last: (rows, columns)."""
        return self._last.clip.spacing_mm if self._last else self.settings.spacing_mm

    def set(self, **changes: Any) -> int:
        """Changes conditions and controls; None takes a condition away.

        Args:
            changes: conditions as `Conditions` takes them, arrays of any library that speaks
                DLPack on the CPU (each is copied once, so its memory may be used again); heart_rate
                in beats per minute; anatomy, an `Anatomy`, a seed, or None; seed of all noise.

        Returns the version; frames that show it carry it. Same values, same version.

        Raises:
            ConditionError: a value is wrong, and then nothing is changed.
        """
        checked = {name: self._checked(name, value) for name, value in changes.items()}
        with self._lock:
            before, now = self._wish.version, time.monotonic()
            self._wish = self._wish.changed(checked, now)
            if self._wish.version != before:
                self.fault = None
                self._overdue = now if self._overdue is None else self._overdue
                self._lock.notify_all()
            return self._wish.version

    def next(self, timeout: float | None = None) -> Clip:
        """The clip of the latest conditions, made now unless it is there already.

        Args:
            timeout: seconds; looked at between two steps.

        Raises:
            DeadlineError: it took longer.
            EngineError: the engine failed, or put out no numbers.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout

        def check() -> None:
            if time.monotonic() > deadline:
                raise DeadlineError(f"clip: not ready within {timeout:g} s: allow more time")

        with self._making:
            wish, made = self._wish, self._last
            if made is None or made.loop.version != wish.version or self.settings.vary:
                made = self._maker.make(wish, check)
                self._accept(made)
            return made.clip

    def frame(self, now: float | None = None) -> Frame:
        """The frame to show at `now`, seconds of the steady clock (default: this moment).

        Waits for the first clip; later never: until a clip is ready the last one plays on.

        Raises:
            HeartBeatError: the first clip cannot be made, or the session is closed.
        """
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = Thread(target=self._work, name="heartbeat", daemon=True)
                self._thread.start()
            while self._player.loop is None and self._ready is None:
                if self._closed:
                    raise Cancelled("session: closed")
                if self.fault is not None:
                    raise self.fault
                self._lock.wait()
            now = time.monotonic() if now is None else now
            self._player.heart_rate = self._wish.heart_rate
            self._show_ready(now)
            return self._player.frame(now, time.time())

    def frames(self, rate: float = 25.0) -> Iterator[Frame]:
        """Frames at a steady rate until the session is closed; late ones are left out and counted.

        Raises: as `frame`.
        """
        frame, due = self.frame(), time.monotonic()
        while not self._closed:
            yield frame
            due += 1 / rate
            late = time.monotonic() - due
            if late > 1 / rate:
                self.stats.missed += int(late * rate)
                due += int(late * rate) / rate
            elif late < 0:
                time.sleep(-late)
            frame = self.frame()

    def close(self) -> None:
        """Ends the session's thread; a clip that is being made is given up between two steps."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _checked(self, name: str, value: Any) -> Any:
        if name not in NAMES or value is None:
            return value if name in NAMES else check_control(name, value)
        manifest = self.manifest
        given: dict[str, Any] = {name: host_array(name, value)}
        one = Conditions(**given, frames=manifest.frames, size=manifest.size)
        if name == "text" and one.text:
            self._maker.warm.check_text(one.text)
        return getattr(one, name)

    def _show_ready(self, now: float) -> None:
        ready, shown = self._ready, self._player.loop
        if ready is None or self._player.fading(now):
            return
        changed = shown is None or ready.loop.version != shown.version
        if changed or self._player.turned(now):
            self._player.show(ready.loop, now)
            self._ready = None
            if changed:
                self.stats.latencies.append(now - ready.at)
            self._lock.notify_all()

    def _accept(self, made: Made) -> None:
        with self._lock:
            self._last = self._ready = made
            self._begun = max(self._begun, made.loop.version)
            self.fault, self._wait, self._retry = None, RETRY, math.inf
            self.stats.clips += 1
            # A change that came meanwhile has waited from now on: it may cancel again.
            newer = self._wish.version != made.loop.version
            self._overdue = time.monotonic() if newer else None
            self._lock.notify_all()

    def _due(self) -> bool:
        """Whether the thread has something to do."""
        more = self.settings.vary and self._ready is None and self.fault is None
        retry = time.monotonic() >= self._retry
        return self._closed or retry or more or self._wish.version != self._begun

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._due():
                    wait = self._retry - time.monotonic()
                    self._lock.wait(None if wait == math.inf else max(wait, 0))
                if self._closed:
                    return
                wish, self._retry = self._wish, math.inf
                self._begun = wish.version
            try:
                with self._making:
                    self._accept(self._maker.make(wish, partial(self._cancel, wish)))
            except Cancelled:
                self.stats.cancelled += 1
            except HeartBeatError as error:
                self._failed(error)

    def _cancel(self, wish: Wish) -> None:
        """Between two steps: newer wishes win, but not for ever, or a slider would stop time."""
        newer, overdue = self._wish.version != wish.version, self._overdue
        patient = overdue is None or time.monotonic() - overdue < self.settings.patience
        if self._closed or (newer and patient):
            raise Cancelled("clip: given up for newer conditions")

    def _failed(self, error: HeartBeatError) -> None:
        """Plays on with what there is; engines are tried again, wrong conditions are not."""
        with self._lock:
            self.fault = error
            self.stats.faults += 1
            if not isinstance(error, ConditionError):
                self._retry = time.monotonic() + self._wait
                self._wait = min(2 * self._wait, LONGEST_RETRY)
            self._lock.notify_all()
