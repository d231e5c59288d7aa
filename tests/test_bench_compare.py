"""compare, github, scaling, peers: figures with known answers, refusals, small real runs."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from heartbeat_benchmarks import cli, compare, peers, peers_report, results, scaling, scaling_report
from heartbeat_benchmarks.commands import github
from heartbeat_benchmarks.commands.options import numbers, words
from heartbeat_benchmarks.commands.peers import way
from heartbeat_benchmarks.peer_networks import PEERS, Peer
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.models.heartbeat import HeartBeat

Result = dict[str, Any]


def made(scale: float, n: int = 100, seed: int = 0, **machine: Any) -> Result:
    """A latency result whose times are lognormal around 100 ms · scale."""
    rng = np.random.Generator(np.random.PCG64(seed))
    times = (100 * scale * np.exp(0.1 * rng.standard_normal(n))).tolist()
    row = {"engine": "onnxruntime", "precision": "fp32", "set": "all", "steps": 10}
    known = {"cpu": "x", "flags": [], "cores": 2, "memory_gb": 8, "omp_num_threads": "", "gpu": ""}
    return {
        "kind": "latency",
        "fingerprint": {"machine": known | machine, "source": {"commit": "0" * 40}},
        "workload": {"frames": 16, "size": 256, "guidance": 1.0, "sampler": "dpmpp_2m"},
        "rows": [row | {"stages": {"total": {"samples": times}}}],
    }


def test_interval_holds_the_true_ratio_and_one_that_does_not_differ() -> None:
    (row,) = compare.compare(made(1.0), made(1.2, seed=1))
    assert row["median"]["low"] < 1.2 < row["median"]["high"]
    assert row["p90"]["low"] < row["p90"]["ratio"] < row["p90"]["high"]
    assert row["says"] == "slower"
    (row,) = compare.compare(made(1.0), made(0.8, seed=1))
    assert row["says"] == "faster"
    (row,) = compare.compare(made(1.0), made(1.0, seed=3))
    assert row["says"] == "no difference seen"
    assert "(" in compare.markdown([row])


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_interval_covers_as_often_as_it_says(quantile: float) -> None:
    """95 % of 100 pairs without a difference; binomial: fewer than 88 has p < 0.003."""
    held = 0
    for seed in range(100):
        rng = np.random.Generator(np.random.PCG64(seed))
        a, b = rng.lognormal(0, 0.3, (2, 60))
        found = compare.ratio(a.tolist(), b.tolist(), quantile, resamples=400)
        held += found["low"] <= 1 <= found["high"]
    assert held >= 88


def test_small_samples_carry_no_p90() -> None:
    (row,) = compare.compare(made(1.0, n=20), made(1.0, n=100))
    assert row["p90"] is None


def test_other_machines_and_other_work_are_refused() -> None:
    a, b = made(1.0), made(1.0, cores=8)
    with pytest.raises(HeartBeatError, match="cores: 2 and 8"):
        compare.compare(a, b)
    assert compare.compare(a, b, force=True)
    b = made(1.0)
    b["workload"]["frames"] = 32
    with pytest.raises(HeartBeatError, match="frames: 16 and 32"):
        compare.compare(a, b, force=True)
    b = made(1.0)
    b["rows"][0]["steps"] = 4
    with pytest.raises(HeartBeatError, match="no row in common"):
        compare.compare(a, b)
    with pytest.raises(HeartBeatError, match="one kind"):
        compare.compare(a, a | {"kind": "waterfall"})


def test_compare_command_gates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [results.save("latency", made(s), tmp_path / n) for s, n in ((1.0, "a"), (1.5, "b"))]
    command = ["compare", *map(str, files)]
    assert cli.main(command) == 0
    assert "slower" in capsys.readouterr().out
    assert cli.main([*command, "--fail-above", "1.1"]) == 1
    assert cli.main(["compare", *map(str, files[::-1]), "--fail-above", "1.1"]) == 0


def test_github_format(tmp_path: Path) -> None:
    path = results.save("latency", made(1.0), tmp_path)
    assert cli.main(["github", str(path), "--out", str(tmp_path / "g.json")]) == 0
    (entry,) = json.loads((tmp_path / "g.json").read_text())
    assert entry["unit"] == "ms"
    assert entry["value"] == pytest.approx(100, rel=0.05)
    assert set(entry) == {"name", "unit", "value", "range", "extra"}
    with pytest.raises(HeartBeatError, match="no timed rows"):
        github.convert({"kind": "quality", "rows": [{"seed": 1}]})


def test_growth_of_known_laws() -> None:
    def rows(law: Any) -> list[dict[str, Any]]:
        return [{"value": x, "median_ms": law(x), "flop": 10 * x} for x in (1, 2, 4, 8)]

    straight = scaling.growth(rows(lambda x: 5 + 3.0 * x))
    assert straight["slope_ms"] == pytest.approx(3)
    assert straight["intercept_ms"] == pytest.approx(5)
    assert straight["r2"] == pytest.approx(1)
    square = scaling.growth(rows(lambda x: 2.0 * x**2))
    assert square["exponent"] == pytest.approx(2)
    assert square["flop_exponent"] == pytest.approx(1)
    assert square["excess"] == pytest.approx(8)
    assert square["r2"] < 0.99


@pytest.fixture(scope="module")
def grown(nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Result:
    plan = scaling.Plan(
        engine="onnxruntime",
        steps=(1, 2, 7, 10),
        batches=(1, 2),
        frames=(),
        sizes=(),
        runs=3,
        probe_sides=(64,),
    )
    result = scaling.run(nano_bundle.path, plan)
    return results.load(results.save("scaling", result, tmp_path_factory.mktemp("scaling")))


def test_scaling(grown: Result, tmp_path: Path) -> None:
    steps, batches = grown["axes"]["steps"]["rows"], grown["axes"]["batches"]["rows"]
    assert [row["value"] for row in steps] == [1, 2, 10]  # there is no table of 7 steps
    assert steps[1]["flop"] - steps[0]["flop"] == (steps[2]["flop"] - steps[0]["flop"]) / 9
    assert batches[1]["flop"] == 2 * batches[0]["flop"]
    assert "r² of cost against steps" in scaling_report.markdown(grown)
    with Image.open(scaling_report.plot(grown, tmp_path / "s.png")) as image:
        assert image.width > 600


def test_scaling_report_says_what_outgrows(grown: Result) -> None:
    bent = copy.deepcopy(grown)
    bent["axes"]["steps"]["growth"] |= {"r2": 0.9, "excess": 2.0}
    text = scaling_report.markdown(bent)
    assert "MISSED: r²" in text
    assert "outgrows operations by 2.00 ×" in text


@pytest.mark.slow
def test_a_bundle_of_another_length(nano_bundle: Bundle, tmp_path: Path) -> None:
    longer = scaling.at_size(nano_bundle, tmp_path / "b", "frames", 6).manifest
    assert (longer.frames, longer.size) == (6, nano_bundle.manifest.size)


SMALL = Peer(
    "small",
    frames=2,
    size=8,
    conditions="none",
    evaluations=5,
    network=lambda: torch.nn.Conv2d(1, 2, 3, padding=1, bias=False),
    call=lambda m: m(torch.zeros(1, 1, 8, 8, device=m.weight.device)),  # type: ignore[arg-type]
    source="here",
    assumed="nothing",
    decoder=lambda: torch.nn.Linear(4, 3),
    decode=lambda m: m(torch.zeros(1, 4, device=m.weight.device)),  # type: ignore[arg-type]
    decodes=2,
)


def test_a_peer_is_counted_and_timed() -> None:
    row = peers.measured(SMALL, peers.Plan(passes=3))
    assert row["parameters"] == 18
    assert row["pass_flop"] == 2 * 64 * 18
    assert row["flop"] == 5 * row["pass_flop"] + 2 * 2 * 12
    wanted = 5 * np.median(row["pass_s"]) + 2 * np.median(row["decode_frame_s"])
    assert row["seconds"] == pytest.approx(wanted)


def test_published_sizes_are_met() -> None:
    """Parameters and operations of the published networks, without memory for them: the weight
    files are 576 MB and 293 MB of fp32; AnimateDiff has 1,312.7 M parameters."""
    known = {peer.name.split(" ")[0]: peer for peer in PEERS}
    lvdm, _ = peers.counted(known["EchoNet-Synthetic"].network, known["EchoNet-Synthetic"].call)
    assert lvdm * 4 / 1e6 == pytest.approx(576, rel=0.01)
    lvfm, _ = peers.counted(known["EchoLVFM"].network, known["EchoLVFM"].call)
    assert lvfm * 4 / 1e6 == pytest.approx(293, rel=0.06)


def test_peers_table(
    nano_model: HeartBeat,
    nano_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peers, "PEERS", (SMALL,))
    nano_model.save_pretrained(tmp_path / "model")
    plan = peers.Plan(
        bundle=str(nano_bundle.path),
        model=tmp_path / "model",
        engines=(
            peers.Way("onnxruntime", 2),
            peers.Way("openvino:fp64", 2),
            peers.Way("onnxruntime", 1, "few_step", "tiny-fast"),
        ),
        eager_steps=2,
        runs=2,
        only="small",
        probe_sides=(64,),
    )
    result = results.load(results.save("peers", peers.run(plan), tmp_path))
    eager, fast, absent, student, small = result["rows"]
    assert [row["how"] for row in (eager, fast, student)] == [
        f"{peers.EAGER}, dpmpp_2m",
        "onnxruntime fp32, dpmpp_2m",
        "onnxruntime fp32, few_step",
    ]
    assert student["name"] == "HeartBeat tiny-fast (ours)"
    learnt = sum(p.numel() for p in nano_model.parameters())
    assert fast["parameters"] == pytest.approx(learnt, rel=0.02)  # and a few moving averages
    assert eager["flop"] > fast["flop"]  # what was hoisted is computed twice
    assert fast["seconds"] > 0
    assert absent["seconds"] is None
    assert small["name"] == "small"
    text = peers_report.markdown(result)
    assert "| small |" in text
    assert "not run" in text
    with pytest.raises(HeartBeatError, match="no such peer"):
        peers.run(peers.Plan(bundle=str(nano_bundle.path), only="nobody", probe_sides=(64,)))


def test_words_on_the_command_line() -> None:
    assert words(" a, b,") == ("a", "b")
    assert numbers("1,2") == (1, 2)
    assert way("openvino:bf16:ddim:4") == peers.Way("openvino:bf16", 4, "ddim")
    assert way("auto:20") == peers.Way("auto", 20)
    assert way("auto:4@tiny-fast") == peers.Way("auto", 4, bundle="tiny-fast")
    for wrong in ("auto", "auto:many", ":", "@tiny"):
        with pytest.raises(HeartBeatError, match="wanted ENGINE:STEPS"):
            way(wrong)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (peers.Way("auto", 4, bundle="nothing"), "bundle nothing"),
        (peers.Way("auto", 3, bundle="tiny-fast"), "steps"),
        (peers.Way("auto", 4, "few_step"), "few_step"),
    ],
)
def test_a_wrong_row_is_refused_before_the_work(
    nano_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, row: peers.Way, said: str
) -> None:
    monkeypatch.setattr(peers.probe, "measure", lambda sides: pytest.fail("work began"))
    with pytest.raises(HeartBeatError, match=said):
        peers.run(peers.Plan(bundle=str(nano_bundle.path), engines=(row,)))
    with pytest.raises(HeartBeatError, match="behind @"):
        peers.run(peers.Plan(bundle="tiny-fast", engines=()))
