"""How a run is asked to stop, and how it is kept from running twice.

SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (batch systems, before they take the machine away) ask for a
checkpoint and an orderly end; so does the file that HEARTBEAT_STOP names, where signals do not
reach the processes: a launcher may swallow them, or kill after a grace too short to save.
"""

import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from heartbeat_fast.errors import FileError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
STOP_FILE = "HEARTBEAT_STOP"  # environment variable


class StopSignal:
    """While it is entered, the first of SIGNALS is noted; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self._number = 0
        self._previous: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def asked(self, look: bool) -> int:
        """The signal's number, or 0; with `look`, the stop file counts as SIGUSR1."""
        if look and not self._number and os.path.exists(os.environ.get(STOP_FILE, "")):
            self._number = signal.SIGUSR1
        return int(self._number)

    def __enter__(self) -> "StopSignal":
        for number in SIGNALS:
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: a test runner's worker keeps its own handlers
                break
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._number = number


@contextmanager
def alone(run: Path, rank: int) -> Iterator[None]:
    """Only one training at a time in `run`; the first of its processes holds the lock.

    Raises: FileError when another one holds it.
    """
    if rank:
        yield
        return
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileError(f"{run}: another process trains here; wanted its end first") from error
        yield
