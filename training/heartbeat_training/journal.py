"""What a run says while it learns: every step's figures in losses.jsonl, TensorBoard, log lines.

losses.jsonl gets one line a step and is synced before each checkpoint. Resuming cuts it to the
checkpoint's step, so after any kill it ends as the file of the run that was not interrupted. A full
disk stops neither: lines wait in memory until they can be written.
"""

import errno
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

REPORT = 100  # steps between log lines
RECENT = 50  # steps of the mean that is shown and returned


class Journal:
    """The figures of one stage's run; in a process that is not the first it only remembers."""

    def __init__(
        self, run: Path, name: str, start: int, steps: int, main: bool, console: Console
    ) -> None:
        self.name, self.steps, self.main, self.console = name, steps, main, console
        self.recent = _cut(run / "losses.jsonl", start) if main else []
        self._file = (run / "losses.jsonl").open("ab", buffering=0) if main else None
        self._waiting = b""  # lines that are not in the file yet
        self._board = _board(run, start) if main else None
        self._since, self._images = time.monotonic(), 0
        hidden = None if main else True  # None: tqdm's own choice, no bar in a log file
        self.bar = tqdm(initial=start, total=steps, desc=name, mininterval=2.0, disable=hidden)

    def mean(self) -> float:
        """Mean loss of the last RECENT steps."""
        return sum(self.recent) / max(len(self.recent), 1)

    def step(self, step: int, scalars: dict[str, float], images: int) -> None:
        """Write one step down; `images` were seen in it, over all processes."""
        self.recent = [*self.recent[1 - RECENT :], scalars["loss"]]
        self._images += images
        if self._file is None:
            return
        self._waiting += json.dumps({"step": step, **scalars}).encode() + b"\n"
        with suppress(OSError):  # `sync` tells, before the checkpoint that needs the lines
            self._write()
        if step % 10 == 0:
            self._plot(step, {f"{self.name}/{key}": value for key, value in scalars.items()})
        if (step + 1) % REPORT == 0 or step + 1 == self.steps:
            self._report(step)
        self.bar.update()

    def _report(self, step: int) -> None:
        """Speed since the last report, pauses for checkpoints included, and peak memory."""
        rate = self._images / max(time.monotonic() - self._since, 1e-9)
        self._since, self._images = time.monotonic(), 0
        memory, kind = peak_memory()
        figures = {"images_per_second": rate, f"peak_{kind}_bytes": memory}
        self._plot(step, {f"{self.name}/{key}": value for key, value in figures.items()})
        line = f"loss {self.mean():.4f}, {rate:.3g} images/s, peak {kind} {memory / 2**30:.2f} GiB"
        self.bar.set_postfix_str(line, refresh=False)
        if self.bar.disable:  # a log file gets lines instead of a bar
            self.console.print(f"{self.name} {step + 1}/{self.steps} {line}", highlight=False)

    def picture(self, image: Any, step: int) -> None:
        """A picture (H, W) or (H, W, 3) uint8 for TensorBoard."""
        if self._board and image is not None:
            layout = "HW" if image.ndim == 2 else "HWC"
            with self._plotting():
                self._board.add_image(f"{self.name}/samples", image, step, dataformats=layout)

    def _plot(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            if self._board:
                with self._plotting():
                    self._board.add_scalar(name, value, step)

    @contextmanager
    def _plotting(self) -> Iterator[None]:
        """Plots are worth less than the run: where they cannot be written they end."""
        try:
            yield
        except OSError as error:
            self._board = None
            self.console.print(f"{self.name}: TensorBoard ends here ({error})", highlight=False)

    def _write(self) -> None:
        """What waits goes into the file, whole lines or nothing."""
        assert self._file is not None
        end = self._file.seek(0, os.SEEK_END)
        try:
            written = self._file.write(self._waiting)
            if written != len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)
            raise
        self._waiting = b""

    def sync(self) -> None:
        """Every line so far is on the disk on return. Raises: OSError when the disk is full."""
        if self._file:
            self._write()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the bar and closes the files."""
        self.bar.close()
        if self._board:
            with self._plotting():
                self._board.close()
        if self._file:
            self._file.close()


def peak_memory() -> tuple[int, str]:
    """Largest memory this process has held, in bytes, and of which kind: "cuda" or "rss"."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated(), "cuda"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "rss"


def _cut(file: Path, start: int) -> list[float]:
    """Drop the lines of steps from `start` on, and a torn last one; returns the recent losses."""
    recent: list[float] = []
    if not file.exists():
        return recent
    good = 0
    with file.open("rb+") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or row["step"] >= start:
                    break
                recent = [*recent[1 - RECENT :], float(row["loss"])]
            except (ValueError, KeyError, TypeError):
                break
            good += len(line)
        lines.truncate(good)
    return recent


def _board(run: Path, start: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=start)
