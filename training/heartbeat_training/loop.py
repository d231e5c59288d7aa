"""One training loop for every stage: Adam, warm-up + cosine, EMA, bf16, checkpoints, TensorBoard.

A stage says what is trained, draws the rows of step i and states their loss. All randomness comes
from (seed, i), so a killed run continues as if nothing had happened, and a batch may be split over
processes or micro-batches (parallel.py). docs/scale.md says what is saved when.
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from heartbeat_fast.errors import HeartBeatError
from heartbeat_training import checkpoints
from heartbeat_training.hardware import Hardware
from heartbeat_training.journal import Journal
from heartbeat_training.parallel import Parallel
from heartbeat_training.processes import gather, join
from heartbeat_training.state import State
from heartbeat_training.stopping import StopSignal, alone

# What a resumed run may change: nothing of it reaches the weights.
FREE = ("checkpoint_minutes", "picture_every")


class TrainingError(HeartBeatError):
    """A run cannot go on, and resuming would meet the same."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage learns. The paper: Adam, 1e-4, 500 warm-up steps, cosine."""

    steps: int
    batch: int
    lr: float = 1e-4
    warmup: int = 500
    ema: float = 0.999
    clip: float = 1.0  # largest gradient norm
    bf16: bool = True
    seed: int = 0
    checkpoint_minutes: float = 5.0
    picture_every: int = 500


class Stage(Protocol):
    """What a stage gives the loop. Its networks are attributes of it.

    A stage whose rows hold several images (clips) says how many: `images_per_row: int`.
    """

    name: str

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that learns, by its name in the model."""
        ...

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Some rows of the step's batch, on the CPU: data and everything random, leading axis =
        rows.

        Random numbers are drawn for the whole batch, from `rng` or torch's global generator, so
        that rows do not depend on how the batch is split; data are read for `rows` only. It runs in
        another thread, while the step before is computed.
        """
        ...

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars, means over the rows given; "loss" is minimised, all are logged. Not random."""
        ...

    def picture(self, step: int) -> np.ndarray[Any, Any] | None:
        """Conditions beside samples (H, W) or (H, W, 3) uint8, or None."""
        ...


def train(
    stage: Stage,
    recipe: Recipe,
    run: Path,
    console: Console | None = None,
    hardware: Hardware | None = None,
) -> float:
    """Run a stage to its last step, resuming from `run` when it has a checkpoint.

    On return the stage's parameters hold the EMA weights, where they were before, in every process.
    Returns the mean loss of the last 50 steps.

    Raises:
        CheckpointError: `run` belongs to another stage or recipe, holds nothing readable, or the
            last step could not be saved.
        TrainingError: a gradient is not finite, or another process trains in `run`.
        SystemExit: with 128 + the signal's number, after a signal and the checkpoint it asked for.
    """
    rank, _ = join()
    console = console or Console(stderr=True)
    console = console if rank == 0 else Console(quiet=True)
    hardware = hardware or Hardware()
    with alone(run, rank), Parallel(stage, recipe.batch, hardware, recipe.bf16) as parallel:
        state = State(parallel.parameters, parallel.statistics.buffers(), recipe.lr)
        loop = _Loop(stage, recipe, run, parallel, state, console)
        mean = loop.run_from(loop.resume())
        state.use_ema()
    return float(gather(mean)[0])


class _Loop:
    """The steps of one stage, and what keeps them."""

    def __init__(
        self,
        stage: Stage,
        recipe: Recipe,
        run: Path,
        parallel: Parallel,
        state: State,
        console: Console,
    ) -> None:
        self.stage, self.recipe, self.run = stage, recipe, run
        self.parallel, self.state, self.console = parallel, state, console
        self.main = parallel.rank == 0

    def resume(self) -> int:
        """The step to go on from: the newest checkpoint's, whose values are loaded; or 0."""
        found = None
        if self.main:
            checkpoints.sweep(self.run)
            found = checkpoints.newest(self.run, lambda line: self._say(f"[yellow]{line}[/]"))
        found = gather(found)[0]  # one choice, whatever a process's disk may show
        if found is None:
            return 0
        name = found.manifest.get("stage")
        if name != self.stage.name:
            raise checkpoints.CheckpointError(
                f"{self.run}: holds stage {name!r}, not {self.stage.name!r}; choose another --run"
            )
        _same_recipe(self.run, found.manifest.get("recipe", {}), self.recipe)
        self.state.load(found.tensors)
        self._say(f"resuming {self.run} at step {found.step} of {self.recipe.steps}")
        return int(found.step)

    def run_from(self, start: int) -> float:
        """Steps `start` to the last; returns the mean loss of the last 50."""
        recipe, journal = self.recipe, self._journal(start)
        saved, lost = time.monotonic(), ""
        batches = _Ahead(self._draw, recipe.steps)
        try:
            with StopSignal() as stop:
                for step in range(start, recipe.steps):
                    scalars, votes = self._step(step, batches, stop, saved)
                    journal.step(step, scalars, recipe.batch * self._images())
                    if (step + 1) % recipe.picture_every == 0:
                        batches.settle()  # a picture draws from the same generator
                        with self.state.averaged():
                            journal.picture(self.parallel.picture(step + 1), step + 1)
                    number = max(vote["stop"] for vote in votes)
                    if votes[0]["due"] or number or step + 1 == recipe.steps:
                        lost = self._save(step + 1, journal)
                        saved = time.monotonic()
                    if number:
                        self._stop(step + 1, number, lost)
        finally:
            batches.close()
            journal.close()
        if lost:
            raise checkpoints.CheckpointError(lost)
        return journal.mean()

    def _step(
        self, step: int, batches: "_Ahead", stop: StopSignal, saved: float
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One update; the batch's scalars, and what every process wants to happen next."""
        recipe, optimizer = self.recipe, self.state.optimizer
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * schedule(step, recipe)
        optimizer.zero_grad(set_to_none=True)
        sums = self.parallel.learn(batches.take(step))
        norm = self.parallel.clip(recipe.clip)
        if not math.isfinite(norm):
            raise TrainingError(
                f"{self.stage.name}: the gradient of step {step} is not finite, and resuming would "
                "meet it again; start anew from the weights so far, with a lower learning rate"
            )
        optimizer.step()
        self.state.average(min(recipe.ema, (1 + step) / (10 + step)))
        due = time.monotonic() - saved > 60 * recipe.checkpoint_minutes
        votes = gather({"sums": sums, "stop": stop.asked(self.main), "due": due})
        return {"grad_norm": norm} | _means([vote["sums"] for vote in votes]), votes

    def _draw(self, step: int) -> dict[str, Tensor]:
        """This process's rows of a step; all that is random comes from (seed, step)."""
        torch.manual_seed(self.recipe.seed * 1_000_003 + step)
        rng = np.random.Generator(np.random.PCG64([self.recipe.seed, step]))
        with torch.no_grad():
            batch = self.stage.draw(step, rng, self.parallel.rows)
        if self.parallel.device.type == "cuda":  # pinned memory is copied without waiting
            return {name: tensor.pin_memory() for name, tensor in batch.items()}
        return batch

    def _save(self, step: int, journal: Journal) -> str:
        """Save a checkpoint; what went wrong, or nothing: a full disk must not end the run."""
        tensors = self.state.tensors()
        if not self.main:
            return ""
        meta = {"stage": self.stage.name, "recipe": asdict(self.recipe)}
        try:
            journal.sync()
            checkpoints.save(self.run, step, tensors, meta)
        except (OSError, checkpoints.CheckpointError) as error:
            self._say(f"[red]{error}; training goes on, the next save tries again[/]")
            return str(error)
        return ""

    def _stop(self, step: int, number: int, lost: str) -> None:
        if lost:
            raise checkpoints.CheckpointError(lost)
        self._say(f"stopped at step {step}; the same command resumes")
        raise SystemExit(128 + number)

    def _journal(self, start: int) -> Journal:
        if self.main:
            self.run.mkdir(parents=True, exist_ok=True)
        return Journal(self.run, self.stage.name, start, self.recipe.steps, self.main, self.console)

    def _images(self) -> int:
        return int(getattr(self.stage, "images_per_row", 1))

    def _say(self, line: str) -> None:
        self.console.print(f"{self.stage.name}: {line}", highlight=False, soft_wrap=True)


class _Ahead:
    """Batches in order, the next one drawn by another thread while this one is computed."""

    def __init__(self, draw: Callable[[int], dict[str, Tensor]], end: int) -> None:
        self._draw, self._end = draw, end
        self._thread = ThreadPoolExecutor(1, "draw")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

    def take(self, step: int) -> dict[str, Tensor]:
        """The batch of `step`; drawing of the one after it begins."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._thread.submit(self._draw, step))
        batch = self._next[1].result()
        self._next = None
        if step + 1 < self._end:
            self._next = (step + 1, self._thread.submit(self._draw, step + 1))
        return batch

    def settle(self) -> None:
        """Nothing is being drawn on return."""
        if self._next:
            wait([self._next[1]])

    def close(self) -> None:
        """The thread ends."""
        self._thread.shutdown(cancel_futures=True)


def schedule(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, then cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0))


def _means(parts: list[dict[str, tuple[float, int]]]) -> dict[str, float]:
    """Means over the rows of all processes, from their sums and numbers."""
    names = dict.fromkeys(name for part in parts for name in part)
    found = {name: [part[name] for part in parts if name in part] for name in names}
    return {k: sum(total for total, _ in v) / sum(rows for _, rows in v) for k, v in found.items()}


def _same_recipe(run: Path, saved: dict[str, Any], recipe: Recipe) -> None:
    """Raises: CheckpointError naming the fields that differ; another recipe is another curve."""
    default = asdict(Recipe(steps=0, batch=0))
    now = {name: value for name, value in asdict(recipe).items() if name not in FREE}
    differ = [
        f"{name} (saved {saved.get(name, default[name])}, now {value})"
        for name, value in now.items()
        if saved.get(name, default[name]) != value
    ]
    if differ:
        raise checkpoints.CheckpointError(
            f"{run}: was begun with another recipe: {', '.join(differ)}; finish it with its own, "
            "or choose another --run"
        )
