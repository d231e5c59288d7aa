"""The paper's stages as runs, on patients in CAMUS' layout, at reduced width."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from heartbeat_training.cli import main
from heartbeat_training.paper_run import run_paper_stage
from heartbeat_training.real_data import RealData
from heartbeat_training.recipes import PAPER
from tests.test_base import narrow
from tests.test_real_data import camus  # noqa: F401  (a fixture)


def test_base_goes_from_patients_to_a_cmr_model(
    camus: RealData,  # noqa: F811
    nano_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    def start() -> tuple[HeartBeat, Tokenizer]:
        return narrow(), nano_tokenizer

    def echo() -> tuple[HeartBeat, Tokenizer]:
        return HeartBeat.from_pretrained(tmp_path / "run/model-stage2"), nano_tokenizer

    short = {k: replace(v, batch=2, epochs=1, warmup=1) for k, v in PAPER.items()}
    run_paper_stage("stage1", tmp_path / "run", camus, short["stage1"], start)
    two = run_paper_stage("stage2", tmp_path / "run", camus, short["stage2"], start)
    cmr = run_paper_stage("cmr", tmp_path / "cmr", camus, short["cmr"], echo)
    story = json.loads((tmp_path / "run/model-stage2/provenance.json").read_text())
    assert story["held_out"] == ["patient0004"]
    assert story["recipe"]["published"]["epochs"] == 1
    assert story["recipe"]["examples"] == 3  # clips of the learners
    kept = next((tmp_path / "run/stage2").glob("step-*/manifest.json"))
    assert json.loads(kept.read_text())["recipe"]["published"]["batch"] == 2
    again = HeartBeat.from_pretrained(tmp_path / "run/model-stage2").state_dict()
    assert all(again[k].equal(v) for k, v in two.state_dict().items())
    moved = {k.split(".")[0] for k, v in cmr.state_dict().items() if not again[k].equal(v)}
    assert moved == {"denoiser", "mask"}


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["stage1"], "give --data"),
        (["codec", "--data", "DATA"], "base's codec is Stable Diffusion's"),
        (["stage2", "--data", "DATA"], "model-stage1: missing"),
        (["stage1", "--data", "DATA"], "--sd15 and --medsam"),
    ],
)
def test_what_base_lacks_is_said_in_a_line(
    camus: RealData,  # noqa: F811
    words: list[str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(camus.folder) if word == "DATA" else word for word in words]
    options = ["--preset", "base", "--run", str(tmp_path / "run"), "--hold-out", "1"]
    assert main([*words, *options]) == 2
    assert reason in capsys.readouterr().err
