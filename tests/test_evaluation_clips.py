"""Figures of clips on phantoms and patients whose answers are known; who may judge whom."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import FileError
from heartbeat_fast.generator import Generator
from heartbeat_fast.sampler import SamplerError
from heartbeat_training.evaluation import lpips
from heartbeat_training.evaluation.cases import (
    Case,
    case_of,
    given,
    open_cases,
    phantom_seeds,
    training_records,
)
from heartbeat_training.evaluation.clips import FIGURES, diversity, figures, summarise
from heartbeat_training.evaluation.distances import EvaluationError
from heartbeat_training.evaluation.generate import Sampling, make, open_generator, table_of
from heartbeat_training.evaluation.judge import train_judge
from heartbeat_training.phantom import record
from heartbeat_training.real_data import RealData

CAMUS = Path(__file__).parents[2] / "shared/data/camus_a4c"
HEADS = Path(__file__).parents[2] / "shared/data/weights/lpips_lin"
Frames = NDArray[np.uint8]


@pytest.fixture(scope="module")
def case() -> Case:
    return case_of(record(900_000, frames=6), "phantom 900000")


def test_real_clip_is_its_own_yardstick(case: Case) -> None:
    """A judge that knows the masks, the source itself: every figure is at its ideal."""
    assert case.record.labels is not None
    labels = case.record.labels
    found = figures(case, case.frames, judge=lambda frames: labels)
    for name in ("ssim", "dice_lv", "dice_myocardium", "dice_la", "flicker_share"):
        assert found[name] == pytest.approx(1)
    assert found["travel_share"] == found["speckle_share"] == pytest.approx(1)
    assert found["spectrum_gap"] == found["ef_error"] == 0
    assert np.isnan(found["lpips"])


def test_figures_see_what_is_wrong(case: Case) -> None:
    """Blur loses texture, another heart's anatomy loses Dice, a still clip does not move."""
    assert case.record.labels is not None
    labels = case.record.labels
    real = figures(case, case.frames, lambda frames: labels)
    blurred = np.stack([cv2.GaussianBlur(f, (0, 0), 2.0) for f in case.frames])
    shifted = np.roll(labels, 20, axis=2)
    found = figures(case, blurred, lambda frames: shifted, real=real)
    assert found["spectrum_gap"] > 3
    assert found["speckle_share"] > 1.2
    assert 0.3 < found["dice_lv"] < 0.9
    assert found["ssim"] < 0.99
    black = figures(case, case.frames * 0, real=real)
    assert np.isnan(black["travel_share"])
    assert not np.isfinite(black["spectrum_gap"])  # and so left out of means
    still = np.repeat(case.frames[:1], len(case.frames), axis=0)
    assert figures(case, still, real=real)["flow_error"] > 2 * real["flow_error"]


def test_without_judge_or_masks_nothing_is_made_up(case: Case) -> None:
    unlabelled = replace(case, record=replace(case.record, labels=None))
    for found in (
        figures(case, case.frames),
        figures(unlabelled, case.frames, judge=lambda frames: frames * 0),
    ):
        assert all(np.isnan(found[name]) for name in ("dice_lv", "ef", "ef_error"))


def test_diversity_counts_anatomy_and_not_speckle() -> None:
    one, twin = (record(7, speckle=k, frames=2).frames for k in (1, 2))
    other = record(8, frames=2).frames
    assert diversity([one, one]) == 0
    assert diversity([one, other]) > 3 * diversity([one, twin]) > 0
    assert np.isnan(diversity([one]))


def test_summary_leaves_out_what_is_missing() -> None:
    rows = [
        {"patient": f"p{i // 2}", "ssim": 0.5 + 0.01 * i, "ef": 50.0 + i, "ef_asked": 48.0 + i}
        for i in range(10)
    ]
    rows[0]["ssim"] = float("nan")
    found = summarise(rows)
    assert set(FIGURES) < set(found)
    assert found["ssim"]["mean"] == pytest.approx(0.55)
    assert found["ssim"]["n"] == 9
    assert found["ssim"]["low"] < 0.55 < found["ssim"]["high"]
    assert found["ef_bias"]["mean"] == pytest.approx(2)
    assert found["ef_r"]["mean"] == pytest.approx(1)
    assert np.isnan(found["lpips"]["mean"])


def trunk(folder: Path, heads: bool = True) -> Path:
    """An AlexNet with random weights under torchvision's names, and heads."""
    torch.manual_seed(0)
    layers, taps = lpips._alex()
    state = {f"features.{k}": v for k, v in layers.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(3)}, folder / "alexnet-owt-7be5be79.pth")
    if heads:
        (folder / lpips.HEADS).mkdir()
        widths = [layers[i - 1].weight.shape[0] for i in taps]
        weights = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(widths)}
        torch.save(weights, folder / lpips.HEADS / "alex.pth")
    return folder


def test_lpips_is_a_distance_where_its_network_is_there(tmp_path: Path) -> None:
    measure, _ = lpips.open_lpips(trunk(tmp_path))
    assert measure is not None
    assert measure.name == "LPIPS v0.1 alex"
    noise = np.random.default_rng(0).integers(0, 200, (9, 64, 64), dtype=np.uint8)
    near, far = noise + 5, np.random.default_rng(1).integers(0, 200, (9, 64, 64), dtype=np.uint8)
    assert measure(noise, noise) == 0
    assert 0 < measure(noise, near) < measure(noise, far)
    assert measure(noise, far) == pytest.approx(measure(far, noise), rel=1e-5)


def test_lpips_layer_is_the_papers_formula(tmp_path: Path) -> None:
    """Σ_layers mean_places Σ_channels w (â − b̂)², computed once more from hooks."""
    measure, _ = lpips.open_lpips(trunk(tmp_path))
    assert measure is not None
    a, b = np.random.default_rng(0).integers(0, 255, (2, 1, 64, 64), dtype=np.uint8)
    seen: dict[int, list[torch.Tensor]] = {i: [] for i in measure.taps}
    for i in measure.taps:
        measure.trunk[i].register_forward_hook(lambda m, x, y, i=i: seen[i].append(y))
    found, wanted = measure(a, b), 0.0
    for head, (x, y) in zip(measure.heads, seen.values(), strict=True):
        unit = [z / torch.linalg.norm(z, dim=1, keepdim=True) for z in (x, y)]
        wanted += float((head * (unit[0] - unit[1]) ** 2).sum(1).mean())
    assert found == pytest.approx(wanted, rel=1e-4)


def test_no_lpips_without_its_network(tmp_path: Path) -> None:
    assert lpips.open_lpips(None)[0] is None
    nothing, reason = lpips.open_lpips(tmp_path)
    assert nothing is None
    assert "vgg16-397923af.pth" in reason
    nothing, reason = lpips.open_lpips(trunk(tmp_path, heads=False))
    assert nothing is None
    assert "heads" in reason
    (tmp_path / lpips.HEADS).mkdir()
    torch.save({"other": torch.zeros(1)}, tmp_path / lpips.HEADS / "alex.pth")
    with pytest.raises(FileError, match=r"version 0\.1"):
        lpips.open_lpips(tmp_path)


def test_published_heads_fit() -> None:
    if not HEADS.is_dir():
        pytest.skip(f"{HEADS}: absent; LPIPS' published heads are not ours to keep here")
    from heartbeat_training.evaluation.weights import load

    for name, (_, taps) in (("alex", lpips._alex()), ("vgg", lpips._vgg())):
        assert len(load(HEADS / f"{name}.pth")) == len(taps)


def test_phantoms_as_cases() -> None:
    cases, refused = open_cases("phantom:900000-900002", frames=4, size=64, limit=2)
    assert [case.patient for case in cases] == ["phantom 900000", "phantom 900001"]
    assert not refused
    assert cases[0].dynamic_range != cases[1].dynamic_range
    assert given(cases[0], ("mask", "text", "ef")).present == ("text", "ef", "mask")
    assert phantom_seeds("camus") == range(0)
    with pytest.raises(EvaluationError, match="backwards"):
        phantom_seeds("phantom:9-1")


def test_held_out_patients_are_held_out() -> None:
    """The test split is the last patients with a sequence; nothing of theirs is learned from."""
    if not CAMUS.is_dir():
        pytest.skip(f"{CAMUS}: absent; the patients are not ours to keep here")
    cases, refused = open_cases(str(CAMUS), hold_out=3)
    assert not refused
    held = {case.patient for case in cases}
    assert len(held) == len(cases) == 3
    assert held == set(RealData(CAMUS, hold_out=3).held_out())  # whom training leaves out
    assert all(set(case.conditions.present) >= {"text", "mask", "flow", "image"} for case in cases)
    names = []
    for i, item in enumerate(training_records(str(CAMUS), hold_out=3)):
        names.append(item.patient)
        assert item.patient not in held
        if i == 4:
            break
    assert len(set(names)) == 5
    with pytest.raises(EvaluationError, match="split"):
        open_cases(str(CAMUS), "validate")


def test_judge_is_trained_once_for_the_same_data(tmp_path: Path) -> None:
    records = [record(seed, frames=2) for seed in (1, 2)]
    first = train_judge(records, steps=4, folder=tmp_path)
    again = train_judge(iter(records), steps=4, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    train_judge(records[:1], steps=4, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(EvaluationError, match="no training clip has labels"):
        train_judge([replace(records[0], labels=None)], folder=tmp_path)


def test_any_number_of_steps(nano_bundle: Bundle) -> None:
    """A table the bundle lacks comes from the exporter, and is the one it would have written."""
    table = table_of(nano_bundle, "dpmpp_2m", 7)
    assert (table.steps, table.name) == (7, "dpmpp_2m")
    assert ("dpmpp_2m", 7) not in nano_bundle.samplers()
    assert table_of(nano_bundle, "unipc", 4) == nano_bundle.samplers()["unipc", 4]
    with pytest.raises(SamplerError, match="sampler"):
        table_of(nano_bundle, "nothing", 7)
    generator = Generator(nano_bundle, Generator.open(nano_bundle).engine)
    nothing = Conditions(text="An ECHO.", frames=4, size=64)
    frames, seconds = make(generator, nothing, Sampling(steps=4, seeds=1), 3)
    assert np.array_equal(frames, generator(nothing, steps=4, seed=3).frames)
    assert seconds > 0
    assert make(generator, nothing, Sampling(steps=7), 3)[0].shape == (4, 64, 64)


def test_no_two_cases_share_their_noise() -> None:
    sampling = Sampling(seeds=3, first_seed=5)
    drawn = [seed for case in range(4) for seed in sampling.seeds_of(case)]
    assert drawn == list(range(5, 17))


def test_neither_bundle_nor_model(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"model_index\.json"):
        open_generator(tmp_path)
