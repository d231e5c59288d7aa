"""Checkpoints that are torn, altered, too large for the disk, of another recipe; how runs end."""

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from heartbeat_fast.errors import FileError
from heartbeat_training import checkpoints
from heartbeat_training.checkpoints import CheckpointError
from heartbeat_training.hardware import Hardware
from heartbeat_training.loop import Recipe, TrainingError, train

RECIPE = Recipe(steps=8, batch=4, lr=0.05, warmup=2, bf16=False, checkpoint_minutes=0)
QUIET, CPU = Console(quiet=True), Hardware(device="cpu")


class Line:
    """Fit a line; `act` is called with every step as its rows are drawn."""

    name = "line"

    def __init__(self, width: int = 3) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(width, 1)
        self.scale = 1.0
        self.before: dict[int, object] = {}

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def draw(self, step: int, rng: np.random.Generator, rows: slice) -> dict[str, Tensor]:
        act = self.before.get(step)
        if callable(act):
            act()
        x = rng.standard_normal((4, self.model.in_features), np.float32)
        return {"x": torch.from_numpy(x)[rows]}

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = batch["x"]
        return {"loss": self.scale * ((self.model(x)[:, 0] - x.sum(1)) ** 2).mean()}

    def picture(self, step: int) -> None:
        return None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def saved(run: Path, *steps: int) -> Path:
    for step in steps:
        checkpoints.save(run, step, {"x": torch.full((4,), float(step))}, {"stage": "s"})
    return run


def found(run: Path) -> tuple[int, list[str]]:
    said: list[str] = []
    checkpoint = checkpoints.newest(run, said.append)
    assert checkpoint is not None
    return checkpoint.step, said


def test_the_newest_is_named_hashed_and_found(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "LATEST",
        "step-00000002",
        "step-00000003",
    ]
    assert (tmp_path / "LATEST").read_text() == "step-00000003\n"
    manifest = json.loads((tmp_path / "step-00000003/manifest.json").read_text())
    assert manifest["files"].keys() == {"tensors.safetensors"}
    assert found(tmp_path) == (3, [])


def test_latest_goes_before_a_higher_number(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "LATEST").write_text("step-00000001\n")
    assert found(tmp_path) == (1, [])
    for wrong in ("", "step-00000009", "../../etc", "x" * 10_000):
        (tmp_path / "LATEST").write_text(wrong)
        assert found(tmp_path) == (2, [])
    (tmp_path / "LATEST").write_bytes(b"\xff\xfe")
    assert found(tmp_path) == (2, [])
    (tmp_path / "LATEST").unlink()
    assert found(tmp_path) == (2, [])


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone", "manifest", "list", "escape"])
def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path, damage: str) -> None:
    saved(tmp_path, 1, 2)
    tensors = tmp_path / "step-00000002/tensors.safetensors"
    manifest = tmp_path / "step-00000002/manifest.json"
    good = tensors.read_bytes()
    if damage == "torn":
        tensors.write_bytes(good[:-3])
    elif damage == "flipped":
        tensors.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif damage == "gone":
        tensors.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:20])
    elif damage == "list":
        manifest.write_text("[]")
    else:
        outside = {"../step-00000001/tensors.safetensors": {"sha256": ""}, tensors.name: {}}
        manifest.write_text(json.dumps({"step": 2, "files": outside}))
    step, said = found(tmp_path)
    assert step == 1
    assert "step-00000002" in said[0]


def test_none_whole_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "step-00000001/tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of 1 checkpoints is whole; move it away"):
        checkpoints.newest(tmp_path, lambda _: None)
    assert checkpoints.newest(tmp_path / "nothing") is None


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    first = Line()
    train(first, RECIPE, tmp_path / "new", QUIET, CPU)
    folder = tmp_path / "new/step-00000008"
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = manifest.pop("files")["tensors.safetensors"]["sha256"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "new/LATEST").unlink()
    (tmp_path / "new/losses.jsonl").unlink()
    again = Line()
    train(again, RECIPE, tmp_path / "new", QUIET, CPU)
    assert torch.equal(again.model.weight, first.model.weight)


def test_a_full_disk_is_one_sentence_and_keeps_the_old(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with (
        largest_file(100_000),
        pytest.raises(CheckpointError, match=r"cannot be saved .*free some space"),
    ):
        checkpoints.save(tmp_path, 2, {"x": torch.zeros(10**6)}, {"stage": "s"})
    assert found(tmp_path) == (1, [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000001"]


def test_training_outlives_a_full_disk(tmp_path: Path) -> None:
    """Saves of steps 3 to 5 fail; nothing of the curve or the end is lost."""
    whole, hurt = Line(width=3000), Line(width=3000)
    train(whole, RECIPE, tmp_path / "whole", QUIET, CPU)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Drawn ahead: the batch of step 3 is drawn during step 2.
    hurt.before = {
        3: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1])),
        6: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    }
    with (tmp_path / "said").open("w") as said:
        train(hurt, RECIPE, tmp_path / "hurt", Console(file=said, width=200), CPU)
    assert "training goes on" in (tmp_path / "said").read_text()
    assert torch.equal(hurt.model.weight, whole.model.weight)
    curves = [(tmp_path / n / "losses.jsonl").read_bytes() for n in ("whole", "hurt")]
    assert curves[0] == curves[1]


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(tmp_path: Path) -> None:
    with largest_file(20_000), pytest.raises(CheckpointError, match="step-00000008: cannot be"):
        train(Line(width=3000), RECIPE, tmp_path, QUIET, CPU)
    again, whole = Line(width=3000), Line(width=3000)
    train(again, RECIPE, tmp_path, QUIET, CPU)
    train(whole, RECIPE, tmp_path / "whole", QUIET, CPU)
    assert torch.equal(again.model.weight, whole.model.weight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_save_and_end_with_their_code(tmp_path: Path, number: signal.Signals) -> None:
    whole, stopped, resumed = Line(), Line(), Line()
    train(whole, RECIPE, tmp_path / "whole", QUIET, CPU)
    rarely = replace(RECIPE, checkpoint_minutes=60)
    stopped.before = {4: lambda: os.kill(os.getpid(), number)}
    with pytest.raises(SystemExit) as end:
        train(stopped, rarely, tmp_path / "run", QUIET, CPU)
    assert end.value.code == 128 + number
    assert found(tmp_path / "run")[0] in (4, 5)  # the batch of step 4 is drawn during step 3
    train(resumed, rarely, tmp_path / "run", QUIET, CPU)
    assert torch.equal(resumed.model.weight, whole.model.weight)


def test_a_stop_file_ends_a_run_like_sigusr1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEARTBEAT_STOP", str(tmp_path / "stop"))
    stage = Line()
    stage.before = {3: (tmp_path / "stop").touch}
    with pytest.raises(SystemExit) as end:
        train(stage, RECIPE, tmp_path / "run", QUIET, CPU)
    assert end.value.code == 128 + signal.SIGUSR1
    assert found(tmp_path / "run")[0] in (3, 4)


def test_another_recipe_is_refused_field_by_field(tmp_path: Path) -> None:
    train(Line(), RECIPE, tmp_path, QUIET, CPU)
    changed = replace(RECIPE, steps=20, lr=0.1, checkpoint_minutes=9, picture_every=3)
    with pytest.raises(CheckpointError) as error:
        train(Line(), changed, tmp_path, QUIET, CPU)
    assert "steps (saved 8, now 20), lr (saved 0.05, now 0.1);" in str(error.value)
    assert "picture" not in str(error.value)


def test_other_parameters_are_refused_by_name(tmp_path: Path) -> None:
    train(Line(), RECIPE, tmp_path, QUIET, CPU)
    with pytest.raises(CheckpointError, match=r"model\.weight is \(1, 3\), the stage's is \(1, 5"):
        train(Line(width=5), RECIPE, tmp_path, QUIET, CPU)


def test_one_training_at_a_time(tmp_path: Path) -> None:
    stage = Line()
    errors: list[BaseException] = []

    def second() -> None:
        try:
            train(Line(), RECIPE, tmp_path, QUIET, CPU)
        except FileError as error:
            errors.append(error)

    stage.before = {2: second}
    train(stage, RECIPE, tmp_path, QUIET, CPU)
    assert "another process trains here" in str(errors[0])


def test_a_gradient_that_is_not_finite_ends_the_run_unsaved(tmp_path: Path) -> None:
    stage = Line()
    stage.before = {5: lambda: setattr(stage, "scale", float("nan"))}
    with pytest.raises(TrainingError, match=r"gradient of step [45] is not finite"):
        train(stage, RECIPE, tmp_path, QUIET, CPU)
    folder = tmp_path / (tmp_path / "LATEST").read_text().strip()
    assert all(t.isfinite().all() for t in load_file(folder / "tensors.safetensors").values())


def test_a_torn_loss_line_is_cut(tmp_path: Path) -> None:
    train(Line(), RECIPE, tmp_path / "whole", QUIET, CPU)
    train(Line(), RECIPE, tmp_path / "run", QUIET, CPU)
    log = tmp_path / "run/losses.jsonl"
    whole = log.read_bytes()
    with log.open("ab") as file:
        file.write(b'{"step": 8, "lo')
    train(Line(), RECIPE, tmp_path / "run", QUIET, CPU)
    assert log.read_bytes() == whole == (tmp_path / "whole/losses.jsonl").read_bytes()


def test_what_a_killed_save_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".writing-abc").mkdir()
    save_file({"x": torch.zeros(3)}, tmp_path / ".writing-abc/tensors.safetensors")
    train(Line(), RECIPE, tmp_path, QUIET, CPU)
    assert not list(tmp_path.glob(".writing-*"))
