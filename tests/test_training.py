"""Training end to end at nano size; a killed run goes on as if nothing had happened."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heartbeat_fast.conditions import NAMES
from heartbeat_fast.models.config import NANO
from heartbeat_training import checkpoints
from heartbeat_training.loop import Recipe, schedule, train
from heartbeat_training.stage_diffusion import DiffusionStage, drop

RECIPE = Recipe(steps=12, batch=4, lr=0.05, warmup=2, bf16=False, picture_every=100)


class Line:
    """A stage small enough to run thousands of steps a second: fit y = wx + b to noisy points."""

    name = "line"

    def __init__(self, die_at: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1)
        self.die_at = die_at

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        if step == self.die_at:
            raise KeyboardInterrupt
        x = torch.from_numpy(rng.standard_normal((4, 3), np.float32)) + 0.1 * torch.randn(4, 3)
        return {"x": x[rows]}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"]
        return {"loss": ((self.model(x)[:, 0] - x.sum(1)) ** 2).mean()}

    def picture(self, step: int) -> None:
        return None


def weights(stage: Line) -> list[float]:
    return [float(v) for p in stage.model.parameters() for v in p.detach().flatten()]


def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = Line()
    train(whole, RECIPE, tmp_path / "whole")
    every = Recipe(**{**RECIPE.__dict__, "checkpoint_minutes": 0.0})
    for die_at in (3, 7, 11):
        with pytest.raises(KeyboardInterrupt):
            train(Line(die_at), every, tmp_path / "killed")
    last = Line()
    train(last, every, tmp_path / "killed")
    assert weights(last) == weights(whole)


def test_sigterm_goes_back_to_its_owner_after_an_error(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        train(Line(die_at=2), RECIPE, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_learns(tmp_path: Path) -> None:
    stage = Line()
    train(stage, Recipe(steps=400, batch=4, lr=0.05, warmup=5, ema=0.9, bf16=False), tmp_path)
    np.testing.assert_allclose(weights(stage)[:3], 1, atol=0.05)


def test_a_broken_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoints.save(tmp_path, step, {"x": torch.full((4,), float(step))}, {"stage": "s"})
    (tmp_path / "step-00000002/tensors.safetensors").write_bytes(b"torn")
    said: list[str] = []
    found = checkpoints.newest(tmp_path, said.append)
    assert found is not None
    assert found.step == 1
    assert "step-00000002: tensors.safetensors is damaged" in said[0]


def test_a_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(tmp_path, 1, {"x": torch.zeros(4)}, {"stage": "s"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(checkpoints.CheckpointError, match="No space left"):
        checkpoints.save(tmp_path, 2, {"x": torch.zeros(4)}, {"stage": "s"})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000001"]


def test_a_run_of_another_stage_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, {"x": torch.zeros(4)}, {"stage": "codec"})
    with pytest.raises(checkpoints.CheckpointError, match="holds stage 'codec'"):
        train(Line(), RECIPE, tmp_path)


def test_schedule_warms_up_and_ends_at_zero() -> None:
    recipe = Recipe(steps=100, batch=1, warmup=10)
    shares = [schedule(i, recipe) for i in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == 1
    assert shares[-1] < 0.001


def test_conditions_drop_on_their_own_and_together() -> None:
    present = drop(20_000, np.random.Generator(np.random.PCG64(0)), images=False)
    # present with probability 0.9 (itself) × 0.9 (all together), local ones × 0.7 (those together)
    np.testing.assert_allclose(present.mean(0), [0.81] * 3 + [0.567] * 4, atol=0.02)
    together = (present.sum(1) == 0).mean()
    assert 0.09 < together < 0.12
    image_alone = present[:, 2].astype(bool) & ~present[:, 3:].any(1)
    assert image_alone.mean() == pytest.approx(0.9**2 * 0.3, abs=0.02)
    images = drop(100, np.random.Generator(np.random.PCG64(0)), images=True)
    assert not images[:, NAMES.index("flow")].any()


def test_clips_without_local_conditions_come_early_in_sampling() -> None:
    class Stage(DiffusionStage):
        def __init__(self, stage: int) -> None:
            model: Any = SimpleNamespace(config=NANO)
            self.stage, self.batch, self.model = stage, 20_000, model

    torch.manual_seed(0)
    present = np.ones((20_000, len(NAMES)), np.float32)
    present[::2, 3:] = 0
    late = (Stage(2).times(present) >= 0.8 * NANO.steps).float()
    assert late[1::2].mean() == pytest.approx(0.2, abs=0.02)  # uniform
    assert late[::2].mean() == pytest.approx(0.6 + 0.4 * 0.2, abs=0.02)
    images = (Stage(1).times(present) >= 0.8 * NANO.steps).float()
    assert images.mean() == pytest.approx(0.2, abs=0.02)


def test_nano_goes_from_phantoms_to_a_clip(tmp_path: Path) -> None:
    from heartbeat_export.build import build_bundle
    from heartbeat_fast.generator import Generator
    from heartbeat_fast.models.heartbeat import HeartBeat
    from heartbeat_fast.text import Tokenizer
    from heartbeat_training.phantom import record
    from heartbeat_training.pipeline import run_stage

    for stage in ("codec", "texture", "stage1", "stage2"):
        run_stage(stage, "nano", tmp_path / "run")
    folder = tmp_path / "run/model-stage2"
    tokenizer = Tokenizer.open(folder / "tokenizer.json")
    build_bundle(HeartBeat.from_pretrained(folder), tokenizer, tmp_path / "bundle")
    generator = Generator.open(tmp_path / "bundle")
    clip = generator(record(3, frames=4, size=64).conditions(), steps=4, seed=1)
    assert clip.frames.shape == (4, 64, 64)
    assert clip.frames.std() > 5
