"""The waterfall: the plain pass gives the same clip, rungs are compared and drawn from the file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from heartbeat_benchmarks import figures, gate, results, waterfall, waterfall_report
from heartbeat_benchmarks.plain_engine import PlainEngine
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.torch_engine import TorchEngine
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_training.phantom import record

Labels = NDArray[np.uint8]


def judge(frames: Labels) -> Labels:
    """Calls what is dark and near the middle the ventricle."""
    out = np.zeros(frames.shape, np.uint8)
    out[:, 20:40, 20:44] = frames[:, 20:40, 20:44] < 128
    return out


@pytest.mark.parametrize("conditions", [None, ("text",), ("mask", "flow")])
def test_plain_pass_makes_the_same_clip(
    nano_model: HeartBeat, nano_bundle: Bundle, conditions: tuple[str, ...] | None
) -> None:
    """Also with a guided and an unguided clip after each other: nothing may be left over."""
    manifest = nano_bundle.manifest
    given = record(3, frames=manifest.frames, size=manifest.size).conditions()
    given = given if conditions is None else given.only(conditions)
    plain = Generator(nano_bundle, PlainEngine(nano_model, nano_bundle))  # type: ignore[arg-type]
    hoisted = Generator(nano_bundle, TorchEngine(nano_model, nano_bundle))
    for seed in (0, 1):
        clips = [make(given, steps=3, seed=seed).frames for make in (plain, hoisted)]
        assert gate.psnr(*clips) > 60


@pytest.fixture(scope="module")
def fallen(
    nano_model: HeartBeat, nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("waterfall")
    nano_model.save_pretrained(folder / "model")
    plan = waterfall.Plan(
        bundle=str(nano_bundle.path),
        model=folder / "model",
        steps=4,
        few=2,
        clips=3,
        probe_sides=(64,),
    )
    return results.load(results.save("waterfall", waterfall.run(plan, judge), folder))


def test_rungs(fallen: dict[str, Any]) -> None:
    names = [row["name"] for row in fallen["rows"]]
    assert names[:3] == [waterfall.REFERENCE, waterfall.HOISTED, "ONNX Runtime fp32"]
    assert names[-1] == waterfall.PIPELINED
    assert any("no student" in name for name in names)
    assert waterfall.SMALL in fallen["absent"]
    first, hoisted, *_, last = fallen["rows"]
    assert first["speedup"] == first["step_gain"] == 1
    assert abs(hoisted["ssim_change"]) < 1e-3  # the order of sums changes, not the clip
    assert last["speedup"] == pytest.approx(first["median_ms"] / last["median_ms"])
    assert len(last["stages"]["total"]["samples"]) == 3
    assert len(fallen["targets"]) == 4


def test_waterfall_is_shown(fallen: dict[str, Any], tmp_path: Path) -> None:
    text = waterfall_report.markdown(fallen)
    assert f"| {waterfall.REFERENCE} |" in text
    assert f"not run: {waterfall.SMALL}" in text
    assert waterfall_report.table(fallen).row_count == len(fallen["rows"])
    for row in fallen["rows"]:
        parts = waterfall_report.parts(row)
        assert sum(parts.values()) == pytest.approx(row["median_ms"] / 1e3)
    with Image.open(waterfall_report.plot(fallen, tmp_path / "w.png")) as image:
        assert image.width > 800


def test_targets_are_held_against_the_reference() -> None:
    def row(name: str, ms: float, ssim: float, level: float) -> dict[str, Any]:
        quality = {"ssim": ssim, "dice": 0.9, "spectrum_db": [10.0, level]}
        return {"name": name, "median_ms": ms, "quality": quality}

    good = [row(waterfall.REFERENCE, 6000, 0.56, 5.0), row("b", 300, 0.55, 5.5)]
    bad = [row(waterfall.REFERENCE, 6000, 0.56, 5.0), row("b", 600, 0.53, 6.5)]
    for rows, wanted in ((good, [True] * 4), (bad, [False, False, True, False])):
        waterfall._compare(rows)
        assert [target["kept"] for target in waterfall.targets(rows)] == wanted
    assert waterfall.targets(bad[1:]) == []


def test_front_keeps_what_nothing_beats() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (0.5, 0.2), (3.0, 0.8)]
    assert figures.front(points) == [3, 0, 2]
