"""One training loop for every stage: Adam, warm-up + cosine, EMA, bf16, checkpoints, TensorBoard.

A stage says what is trained, draws the rows of step i and states their loss. All randomness comes
from (seed, i), so a killed run continues as if nothing had happened, and a batch may be split over
processes or micro-batches.
"""

import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from tqdm import tqdm

from heartbeat_training import checkpoints


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
    """What a stage gives the loop."""

    name: str

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that learns, by its name in the model."""
        ...

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        """Some rows of the step's batch: data and everything random, leading axis = rows.

        Random numbers are drawn for the whole batch, from `rng` or torch's global generator, so
        that rows do not depend on how the batch is split; data are read for `rows` only.
        """
        ...

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scalars, means over the rows given; "loss" is minimised, all are logged. Not random."""
        ...

    def picture(self, step: int) -> np.ndarray[Any, Any] | None:
        """Conditions beside samples (H, W) or (H, W, 3) uint8, or None."""
        ...


def train(stage: Stage, recipe: Recipe, run: Path, console: Console | None = None) -> float:
    """Run a stage to its last step, resuming from `run` when it has a checkpoint.

    On return the stage's parameters hold the EMA weights. Returns the mean loss of the last 50
    steps. Raises: CheckpointError when `run` belongs to another stage.
    """
    console = console or Console(stderr=True)
    state = _State(stage.parameters(), recipe)
    start = _resume(state, recipe, stage.name, run, console)
    with _StopSignal() as stop:
        recent = _run(stage, state, recipe, run, start, stop, console)
    state.use_ema()
    return sum(recent) / max(len(recent), 1)


def _run(
    stage: Stage,
    state: "_State",
    recipe: Recipe,
    run: Path,
    start: int,
    stop: "_StopSignal",
    console: Console,
) -> list[float]:
    """Steps `start` to the last; returns the losses of the last 50."""
    writer = _writer(run)
    recent: list[float] = []
    saved = time.monotonic()
    bar = tqdm(
        range(start, recipe.steps),
        initial=start,
        total=recipe.steps,
        desc=stage.name,
        mininterval=2.0,
        disable=None,
    )
    for step in bar:
        scalars = _step(stage, state, recipe, step)
        recent = [*recent[-49:], scalars["loss"]]
        if bar.disable and (step + 1) % 100 == 0:  # a log file gets lines instead of a bar
            console.print(
                f"{stage.name} {step + 1}/{recipe.steps} loss {sum(recent) / len(recent):.4f}"
            )
        bar.set_postfix(loss=f"{sum(recent) / len(recent):.4f}", refresh=False)
        if writer and step % 10 == 0:
            for name, value in scalars.items():
                writer.add_scalar(f"{stage.name}/{name}", value, step)
        if writer and (step + 1) % recipe.picture_every == 0:
            _picture(stage, state, writer, step + 1)
        due = time.monotonic() - saved > 60 * recipe.checkpoint_minutes
        if due or stop.asked or step + 1 == recipe.steps:
            _save(state, recipe, stage.name, run, step + 1)
            saved = time.monotonic()
        if stop.asked:
            raise SystemExit(f"stopped at step {step + 1}; the same command resumes")
    return recent


class _State:
    """Parameters, their EMA and the optimizer."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> None:
        self.parameters = dict(parameters)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=recipe.lr, foreach=True)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint stores, flat."""
        flat = {f"ema.{n}": t for n, t in self.ema.items()}
        for name, p in self.parameters.items():
            flat[f"model.{name}"] = p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                flat[f"adam.{key}.{name}"] = value
        return flat

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"model.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
                keys = ("step", "exp_avg", "exp_avg_sq")
                if f"adam.step.{name}" in tensors:
                    self.optimizer.state[p] = {k: tensors[f"adam.{k}.{name}"].clone() for k in keys}

    def use_ema(self) -> None:
        """Put the averaged weights into the model."""
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(self.ema[name])


def _step(stage: Stage, state: _State, recipe: Recipe, step: int) -> dict[str, float]:
    torch.manual_seed(recipe.seed * 1_000_003 + step)
    rng = np.random.Generator(np.random.PCG64([recipe.seed, step]))
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.lr * schedule(step, recipe)
    device = next(iter(state.parameters.values())).device.type
    with torch.autocast(device, torch.bfloat16, enabled=recipe.bf16):
        scalars = stage.loss(stage.draw(step, rng, slice(0, recipe.batch)))
    state.optimizer.zero_grad(set_to_none=True)
    scalars["loss"].backward()
    norm = nn.utils.clip_grad_norm_(state.parameters.values(), recipe.clip)
    state.optimizer.step()
    decay = min(recipe.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(
            list(state.ema.values()), [p.detach() for p in state.parameters.values()], 1 - decay
        )
    return {"grad_norm": float(norm)} | {name: float(v.detach()) for name, v in scalars.items()}


def schedule(step: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, then cosine to zero."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0))


def _resume(state: _State, recipe: Recipe, name: str, run: Path, console: Console) -> int:
    found = checkpoints.load_latest(run)
    if found is None:
        return 0
    step, tensors, manifest = found
    if manifest.get("stage") != name:
        raise checkpoints.CheckpointError(
            f"{run}: holds stage {manifest.get('stage')!r}, not {name!r}; choose another --run"
        )
    state.load(tensors)
    console.print(f"{name}: resuming {run} at step {step} of {recipe.steps}")
    return step


def _save(state: _State, recipe: Recipe, name: str, run: Path, step: int) -> None:
    checkpoints.save(run, step, state.tensors(), {"stage": name, "recipe": asdict(recipe)})


def _writer(run: Path) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"))


def _picture(stage: Stage, state: _State, writer: Any, step: int) -> None:
    """Log the stage's picture, drawn with the averaged weights."""
    kept = {name: p.detach().clone() for name, p in state.parameters.items()}
    state.use_ema()
    image = stage.picture(step)
    if image is not None:
        layout = "HW" if image.ndim == 2 else "HWC"
        writer.add_image(f"{stage.name}/samples", image, step, dataformats=layout)
    with torch.no_grad():
        for name, p in state.parameters.items():
            p.copy_(kept[name])


class _StopSignal:
    """SIGTERM and Ctrl-C ask for a checkpoint and an orderly end."""

    def __init__(self) -> None:
        self.asked = False
        self._previous: Callable[..., Any] | int | None = signal.getsignal(signal.SIGTERM)
        try:
            signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread: a test runner's worker keeps its own handler
            self._previous = None

    def __enter__(self) -> "_StopSignal":
        return self

    def __exit__(self, *_: object) -> None:
        """Give SIGTERM back to whoever had it."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
