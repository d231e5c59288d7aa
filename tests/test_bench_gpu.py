"""The scripts for a machine with a GPU, run dry on this one: nano, fp32, no figures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from heartbeat_fast.models.heartbeat import HeartBeat

ROOT = Path(__file__).parents[1]


def script(name: str, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A script of benchmarks/gpu as its README says to run it, on one thread, without a GPU."""
    known = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu" / name), "--preset", "nano", *options],
        env=known | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_clips_in_every_way(tmp_path: Path) -> None:
    done = script("4_clips.sh", tmp_path, "--runs", "2", "--sets", "text,all")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "clip-nano.json").read_text())
    rows: list[dict[str, Any]] = result["rows"]
    assert {row["way"] for row in rows} == {"plain", "compiled", "ours"}
    for row in rows:
        assert row["grey_levels_from_plain"] <= 0.1  # the same clip in every way, but for rounding
        assert row["share_of_peak"] > 0
    flop = {(row["set"], row["steps"]): row["pass_flop"] for row in rows}
    assert flop["text", 20] < flop["all", 20]  # without an image its branch rests
    assert "all" in done.stdout.splitlines()[-1]


def test_training_in_pieces(tmp_path: Path) -> None:
    """A first piece without time stops before a stage; a second one finishes; the weights come
    home whole."""
    options = ("--run", str(tmp_path / "run"), "--share", "0.1", "--workers", "2")
    first = script("5_train_tiny.sh", tmp_path, *options, "--minutes", "0")
    assert first.returncode == 75, first.stderr
    assert "run the same command again" in first.stdout
    second = script("5_train_tiny.sh", tmp_path, *options, "--minutes", "9")
    assert second.returncode == 0, second.stderr
    result = json.loads((tmp_path / "train-tiny.json").read_text())
    assert result["done"] == result["wanted"]
    weights = tmp_path / "tiny-weights.safetensors"
    home = ("--unpack", str(weights), "--to", str(tmp_path / "home"))
    assert script("5_train_tiny.sh", tmp_path, *home).returncode == 0
    came, left = (
        HeartBeat.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "home", tmp_path / "run" / "model-stage2")
    )
    assert came.keys() == left.keys()
    for key, tensor in left.items():
        half = tensor.half().float() if tensor.is_floating_point() else tensor
        assert np.array_equal(came[key].numpy(), half.numpy())
    assert (tmp_path / "home" / "tokenizer.json").exists()
