"""The retraining drill with real training: a model learns, goes into use, learns on, is rebuilt.

The steps are those of the stages as `heartbeat-train` runs them, at nano size. One full export is
really traced, the one that the rebuilt bundle must equal; the bundle in use begins as the session's
and comes to the first model by a rebuild of its own.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heartbeat_export.build import build_bundle, load_folder
from heartbeat_export.cli import main
from heartbeat_export.parity import beating_ring
from heartbeat_export.rebuild import rebuild
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import engine_class
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.heartbeat import HeartBeat, stage_parameters
from heartbeat_training.pipeline import run_stage

HALF = 0.5  # of the plan's steps: 15, 5, 15 and 5 of the stages


def engines() -> list[str]:
    """Engine and precision, as far as they run here."""
    choices = [f"openvino:{name}" for name in engine_class("openvino").precisions()]
    return ["onnxruntime", *(choice for choice in choices if not choice.endswith("int8"))]


def clips(folder: Path) -> dict[str, NDArray[np.uint8]]:
    """The same clip on every engine."""
    bundle = Bundle.open(folder)
    ring = beating_ring(bundle.manifest.frames, bundle.manifest.size)
    return {
        engine: Generator.open(bundle, engine)(ring, steps=2, seed=3).frames for engine in engines()
    }


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the graph files as they are on disk, by graph."""
    return {
        name: hashlib.sha256((folder / spec.file).read_bytes()).hexdigest()
        for name, spec in Bundle.open(folder).manifest.graphs.items()
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders: "a" after all four stages, "b" after as many steps of stage 2 once more."""
    first, more = (tmp_path_factory.mktemp("runs") / name for name in ("first", "more"))
    for stage in ("codec", "texture", "stage1", "stage2"):
        run_stage(stage, "nano", first, share=HALF)
    # Stage 2 goes on from what it left, as from any model that a stage before it left.
    shutil.copytree(first / "model-stage2", more / "model-stage1")
    shutil.copytree(first / "clips", more / "clips")
    run_stage("stage2", "nano", more, share=HALF)
    return {"a": first / "model-stage2", "b": more / "model-stage2"}


@pytest.fixture(scope="module")
def used(
    nano_bundle: Bundle, trained: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of model "a"."""
    folder = shutil.copytree(nano_bundle.path, tmp_path_factory.mktemp("used") / "bundle")
    assert rebuild(folder, trained["a"]).road == "swap"
    return folder


@pytest.fixture
def bundle(used: Path, tmp_path: Path) -> Path:
    """A copy to rebuild."""
    return shutil.copytree(used, tmp_path / "bundle")


def test_more_training_makes_the_clip_of_a_full_export(
    bundle: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    before = clips(bundle)
    report = rebuild(bundle, trained["b"])
    assert report.road == "swap"
    model, tokenizer, provenance, card = load_folder(trained["b"])
    full = tmp_path / "full"
    build_bundle(model, tokenizer, full, provenance=provenance, card=card)
    after, wanted = clips(bundle), clips(full)
    assert len(after) > 1
    for engine in after:
        assert np.array_equal(after[engine], wanted[engine]), engine
        assert not np.array_equal(after[engine], before[engine]), engine
    prints = [Bundle.open(folder).manifest.fingerprints for folder in (bundle, full)]
    assert all(prints[0][key] == prints[1][key] for key in ("arch", "weights"))


def test_only_what_the_stage_trains_is_listed_as_changed(
    bundle: Path, trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = [HeartBeat.from_pretrained(trained[name]) for name in "ab"]
    learned = set(stage_parameters(models[0], 2, False))
    a, b = (model.state_dict() for model in models)
    moved = {key for key in a if not torch.equal(a[key], b[key])}
    assert moved
    assert moved <= learned
    assert main(["rebuild", str(trained["b"]), "--bundle", str(bundle), "--json"]) == 0
    changed = json.loads(capsys.readouterr().out)["changed"]
    listed = {tensor for tensors in changed.values() for tensor in tensors}
    assert listed <= moved
    # Weights are kept in half precision: what moved by less than half of its last bit did not.
    halves = {key for key in moved if not torch.equal(a[key].half(), b[key].half())}
    assert listed == halves
    assert any(key.startswith("flow.") for key in listed)
    assert any(key.startswith("denoiser.") for key in listed)  # its temporal layers


def test_there_and_back_after_training(bundle: Path, trained: dict[str, Path]) -> None:
    manifest = (bundle / "manifest.json").read_bytes()
    files, frames = digests(bundle), clips(bundle)
    assert rebuild(bundle, trained["b"]).road == "swap"
    there = digests(bundle)
    assert {name for name in files if files[name] != there[name]} >= {"local", "denoise"}
    assert files["decode"] == there["decode"]  # its stage was over
    assert rebuild(bundle, trained["a"]).road == "swap"
    assert digests(bundle) == files
    again = clips(bundle)
    assert all(np.array_equal(again[engine], frames[engine]) for engine in frames)

    for wanted in (there, files):
        assert main(["rollback", "--bundle", str(bundle)]) == 0
        assert digests(bundle) == wanted
    assert (bundle / "manifest.json").read_bytes() == manifest
