"""One thread that owns the generator: a bounded queue before it, deadlines and cancellation in it.

Sampling keeps every core busy, so two clips at once would only make both late.
"""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from heartbeat_fast.clip import Clip
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import EngineError, HeartBeatError
from heartbeat_fast.generator import Generator

LONGEST_QUEUE = 8  # clips waiting; more are refused


class Busy(HeartBeatError):
    """The queue is full; `seconds` is when to ask again."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"busy: {LONGEST_QUEUE} clips wait already; ask again in {seconds:.0f} s")
        self.seconds = seconds


class Late(HeartBeatError):
    """The deadline passed before the clip was done."""


class Cancelled(HeartBeatError):
    """Nobody waits for this clip any more."""


class Ticket:
    """A clip that is asked for: its future, its deadline, and a way to give it up."""

    def __init__(self, work: Callable[["Ticket"], Clip], seconds: float | None) -> None:
        self.work = work
        self.future: Future[Clip] = Future()
        self.due = None if seconds is None else time.monotonic() + seconds
        self._given_up = threading.Event()

    def cancel(self) -> None:
        """Gives the clip up; it ends before its next step."""
        self._given_up.set()

    def check(self, *_: int) -> None:
        """Between steps: goes on, or raises Late or Cancelled."""
        if self._given_up.is_set():
            raise Cancelled("cancelled: nobody waits for this clip")
        if self.due is not None and time.monotonic() > self.due:
            raise Late("deadline: passed before the clip was done; wanted more time or fewer steps")


class Worker:
    """Runs tickets one after another on a thread of its own, after a warm-up.

    Args:
        generator: used by this thread only.
    """

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.ready = threading.Event()
        self.failure: str | None = None  # why it will never be ready
        self.seconds = 1.0  # of the last clip
        self._queue: queue.Queue[Ticket | None] = queue.Queue(LONGEST_QUEUE)
        self._running: Ticket | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat-worker", daemon=True)

    def start(self) -> None:
        """Starts the warm-up; `ready` is set after it."""
        self._thread.start()

    def stop(self) -> None:
        """Gives up what waits and runs, and ends the thread."""
        running = self._running
        if running is not None:
            running.cancel()
        while True:
            try:
                waiting = self._queue.get_nowait()
            except queue.Empty:
                break
            if waiting is not None:
                waiting.future.cancel()
        self._queue.put(None)
        self._thread.join(30)

    @property
    def waiting(self) -> int:
        """Clips in the queue."""
        return self._queue.qsize()

    def ask(
        self, prepare: Callable[[], tuple[Conditions, dict[str, Any]]], seconds: float | None = None
    ) -> Ticket:
        """Queues a clip.

        Args:
            prepare: called by the worker when the clip's turn comes, so that it sees the newest
                controls; gives the conditions and Generator's other arguments.
            seconds: the deadline, from now.

        Raises:
            Busy: the queue is full.
            EngineError: the warm-up failed.
        """

        def work(ticket: Ticket) -> Clip:
            conditions, how = prepare()
            ticket.check()
            return self.generator(conditions, progress=ticket.check, **how)

        if self.failure is not None:
            raise EngineError(self.failure)
        ticket = Ticket(work, seconds)
        try:
            self._queue.put_nowait(ticket)
        except queue.Full:
            raise Busy(max(1.0, self.seconds * LONGEST_QUEUE / 2)) from None
        return ticket

    def _run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:  # whatever it is, the health page must say it
            self.failure = f"warm-up failed: {error}"
        else:
            self.ready.set()
        while (ticket := self._queue.get()) is not None:
            if not ticket.future.set_running_or_notify_cancel():
                continue
            self._running = ticket
            start = time.monotonic()
            try:
                ticket.check()
                clip = ticket.work(ticket)
            except BaseException as error:  # the thread must outlive any clip
                ticket.future.set_exception(error)
            else:
                self.seconds = time.monotonic() - start
                ticket.future.set_result(clip)
            self._running = None

    def _warm_up(self) -> None:
        manifest = self.generator.bundle.manifest
        name, steps = min(self.generator.bundle.samplers(), key=lambda key: key[1])
        start = time.monotonic()
        nothing = Conditions(frames=manifest.frames, size=manifest.size)
        self.generator(nothing, sampler=name, steps=steps)
        self.seconds = time.monotonic() - start
