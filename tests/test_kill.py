"""Training is killed with SIGKILL at 20 random moments and ends with the same bits.

As a script (`test_kill.py FOLDER SEED`) this file is the victim: torch is imported once and every
life is a fork of it, so that 20 of them fit a test.
"""

import contextlib
import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import Recipe, train

KILLS, STEPS = 20, 200
RECIPE = Recipe(steps=STEPS, batch=6, lr=3e-3, warmup=20, ema=0.99, bf16=False)
# While kills fall, a save every step or two: they land in saves, in renames and between them.
OFTEN = replace(RECIPE, checkpoint_minutes=0.0002)


class Blobs:
    """A small convolutional network with BatchNorm; micro-batches, so nothing is left out."""

    name = "blobs"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.BatchNorm2d(2), nn.Conv2d(2, 64, 3), nn.SiLU(), nn.Conv2d(64, 256, 3), nn.SiLU()
        )
        self.head = nn.Linear(256, 1)

    def parameters(self) -> dict[str, nn.Parameter]:
        named = {**dict(self.model.named_parameters(prefix="model"))}
        return named | dict(self.head.named_parameters(prefix="head"))

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        x = torch.from_numpy(rng.standard_normal((6, 2, 8, 8), np.float32)) * 3 + 1
        return {"x": x[rows], "noise": torch.randn(6)[rows]}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        guess = self.head(self.model(batch["x"]).mean((2, 3)))[:, 0]
        wanted = batch["x"].std((1, 2, 3)) + 0.01 * batch["noise"]
        return {"loss": ((guess - wanted) ** 2).mean()}

    def picture(self, step: int) -> None:
        return None


def live(run: Path, recipe: Recipe = RECIPE) -> None:
    torch.set_num_threads(1)
    train(Blobs(), recipe, run, Console(quiet=True), Hardware(device="cpu", micro_batch=4))


def lines(run: Path) -> int:
    file = run / "losses.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill_at_random(run: Path, dice: random.Random) -> dict[str, Any]:
    """One life: forked, watched until it has made some steps, killed; says where it was hit."""
    before = lines(run)
    child = os.fork()
    if child == 0:
        try:
            live(run, OFTEN)
        finally:
            os._exit(0)
    wanted, pause = dice.randint(1, 6), dice.uniform(0, 0.015)
    deadline = time.monotonic() + 20
    while abs(lines(run) - before) < wanted and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    saving = [path.name for path in run.glob(".writing-*")]
    return {
        "killed": os.WIFSIGNALED(status),
        "in_save": bool(saving),
        "lines": lines(run),
        "checkpoints": sorted(p.name for p in run.glob("step-*")),
    }


def main(folder: Path, seed: int) -> None:
    with contextlib.suppress(ImportError):  # the lives inherit what is imported here
        importlib.import_module("torch.utils.tensorboard")
    dice = random.Random(seed)
    live(folder / "whole")
    lives = [kill_at_random(folder / "killed", dice) for _ in range(KILLS)]
    live(folder / "killed")
    print(json.dumps(lives))


def digest(run: Path) -> str:
    return hashlib.sha256((run / f"step-{STEPS:08d}/tensors.safetensors").read_bytes()).hexdigest()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_leave_the_same_curve_and_weights(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path), "7"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    lives = json.loads(done.stdout.splitlines()[-1])
    assert [life["killed"] for life in lives] == [True] * KILLS
    hits = sum(life["in_save"] for life in lives)
    assert 0 < hits < KILLS, "kills must land in saves and between them"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (killed / "losses.jsonl").read_bytes() == (whole / "losses.jsonl").read_bytes()
    assert lines(whole) == STEPS
    assert digest(killed) == digest(whole)
    assert not list(killed.glob(".writing-*"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
