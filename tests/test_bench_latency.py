"""Latency: every row whole, its operations counted, its doubts said; tables and plots from it."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from heartbeat_benchmarks import (
    figures,
    flops,
    gate,
    latency,
    latency_report,
    probe,
    results,
    sets,
    validity,
)
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import NAMES
from heartbeat_fast.errors import HeartBeatError
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.graphs import build_graphs, example_inputs
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_training.evaluate import ALL
from heartbeat_training.phantom import record

Peaks = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def timed(nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run, as it reads back from its file."""
    work = latency.Workload(
        engines=("onnxruntime",),
        sets=("none", ALL),
        steps=(2, 4),
        runs=7,
        batches=(1, 2),
        cold_starts=1,
        probe_sides=(64,),
    )
    result = latency.run(nano_bundle.path, work)
    return results.load(results.save("latency", result, tmp_path_factory.mktemp("results")))


def test_rows_are_whole(timed: dict[str, Any]) -> None:
    assert [(row["set"], row["steps"]) for row in timed["rows"]] == [
        ("none", 2),
        (ALL, 2),
        ("none", 4),
        (ALL, 4),
    ]
    for row in timed["rows"]:
        stages = row["stages"]
        total, parts = stages["total"], [s for name, s in stages.items() if name != "total"]
        assert len(total["samples"]) == 7
        assert "p50" in total
        assert "p90" not in total
        # the stages and "other" are all of a clip
        assert sum(s["samples"][0] for s in parts) == pytest.approx(total["samples"][0], abs=0.05)
        assert row["distinct_clips"] == 7
        assert row["share_of_peak"] > 0
        assert row["gate"]["passed"]
    assert timed["rows"][0]["stages"]["image"]["min"] < 1  # an absent condition's encoder rests
    assert timed["rows"][0]["flop"] < timed["rows"][1]["flop"] < timed["rows"][3]["flop"]


def test_batches_cold_starts_and_verdict(timed: dict[str, Any]) -> None:
    one, two = timed["batches"]
    assert one["total"]["p50"] < two["total"]["p50"]
    assert {row["changed"] for row in timed["first_frame"]} == set(NAMES)
    for row in timed["first_frame"]:
        assert row["ms"]["n"] == 7  # every change was a new clip
    (cold,) = timed["cold"]
    assert set(cold["stages"]) == {"import", "open", "first clip", "second clip"}
    assert 20 < cold["peak_memory_mb"] < 4000
    assert timed["quality"] is None
    assert not timed["verdict"]["valid"]  # seven clips carry no p90
    assert "7 clips a row" in " ".join(timed["verdict"]["reasons"])


def test_tables_and_plots_come_from_the_file(timed: dict[str, Any], tmp_path: Path) -> None:
    text = latency_report.markdown(timed)
    assert text.count("| onnxruntime fp32 |") == 4
    assert "–" in text  # seven runs say nothing of p90
    assert "INVALID" in text
    assert latency_report.table(timed).row_count == 4
    assert latency_report.stages(timed).row_count == 4
    for draw in (figures.ecdf, figures.stages):
        with Image.open(draw(timed, tmp_path / f"{draw.__name__}.png")) as image:
            assert image.width > 500


def test_a_slow_row_is_seen_in_the_table(timed: dict[str, Any]) -> None:
    slow = copy.deepcopy(timed)
    slow["rows"][1]["stages"]["total"]["p50"] = 123456.7
    slow["rows"][1]["gate"]["passed"] = False
    text = latency_report.markdown(slow)
    assert "123456.7" in text
    assert "**FAILED**" in text


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("none", ()),
        ("text", ("text",)),
        ("+sketch", ("text", "image", "sketch")),
        ("mask+ef", ("ef", "mask")),
        ("all-flow", tuple(n for n in NAMES if n != "flow")),
        ("all", NAMES),
    ],
)
def test_sets_by_name(name: str, wanted: tuple[str, ...]) -> None:
    assert sets.conditions_of(name) == wanted


def test_groups_of_sets() -> None:
    assert sets.expand(("none", "singles", "mask")) == (
        *("none", "ef", "image", "sketch", "mask", "skeleton", "flow"),
    )
    assert len(sets.expand(("without",))) == len(NAMES)
    for wrong in ("masks", "all-masks", "mask+", "+nothing"):
        with pytest.raises(HeartBeatError, match="wanted"):
            sets.expand((wrong,))


def test_flop_are_those_that_torch_counts(nano_model: HeartBeat, nano_bundle: Bundle) -> None:
    """Of the graphs without attention, whose products torch's counter sees on every backend."""
    counts, examples = flops.bundle_flop(nano_bundle), example_inputs(nano_model)
    for name in ("local", "decode", "encode"):
        graph = build_graphs(nano_model)[name]
        with FlopCounterMode(display=False) as counted, torch.no_grad():
            graph.module(*examples[name].values())
        assert counts[name] == counted.get_total_flops()


@pytest.mark.parametrize(
    ("op", "inputs", "out", "attributes", "wanted"),
    [
        ("Conv", [(1, 8, 5, 5), (6, 2, 3, 3)], (1, 6, 5, 5), {"group": 4}, 2 * 150 * 18),
        ("ConvTranspose", [(1, 8, 5, 5), (8, 3, 2, 2)], (1, 3, 10, 10), {}, 2 * 200 * 12),
        ("MatMul", [(2, 4, 8), (8, 3)], (2, 4, 3), {}, 2 * 24 * 8),
        ("Gemm", [(8, 4), (8, 3)], (4, 3), {"transA": 1}, 2 * 12 * 8),
        ("Attention", [(1, 2, 5, 4), (1, 2, 7, 4), (1, 2, 7, 4)], (1, 2, 5, 4), {}, 4 * 40 * 7),
        ("Relu", [(5, 5)], (5, 5), {}, 0),
    ],
)
def test_flop_of_a_node(
    op: str,
    inputs: list[tuple[int, ...]],
    out: tuple[int, ...],
    attributes: dict[str, int],
    wanted: int,
) -> None:
    names = [f"i{i}" for i in range(len(inputs))]
    kind = onnx.TensorProto.FLOAT
    values = [
        onnx.helper.make_tensor_value_info(*pair)
        for pair in zip(names, [kind] * len(names), inputs, strict=True)
    ]
    result = onnx.helper.make_tensor_value_info("o", kind, out)
    node = onnx.helper.make_node(op, names, ["o"], **attributes)  # type: ignore[arg-type]
    assert (
        flops.count(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values, [result])))
        == wanted
    )


def test_flop_of_a_clip(nano_bundle: Bundle) -> None:
    graphs = flops.bundle_flop(nano_bundle)
    assert set(graphs) == set(nano_bundle.manifest.graphs)
    few, many = (flops.clip_flop(graphs, NAMES, steps, 1.0) for steps in (4, 10))
    assert many - few == 6 * graphs["denoise"]
    assert flops.clip_flop(graphs, NAMES, 4, 2.0) - few == 4 * graphs["denoise"]
    bare = flops.clip_flop(graphs, ("text",), 4, 1.0)
    assert few - bare == graphs["image"] + graphs["local"]


def test_gate_knows_a_changed_clip(nano_bundle: Bundle) -> None:
    manifest = nano_bundle.manifest
    given = record(1, frames=manifest.frames, size=manifest.size).conditions()
    reference = Generator.open(nano_bundle, "onnxruntime")
    held = gate.Gate(reference, 1.0, "dpmpp_2m")
    assert held.verdict(reference, given, 4)["psnr_db"] == gate.SAME_DB

    class Wrong(Generator):
        def decode(self, *args: Any, **named: Any) -> Any:
            return 255 - super().decode(*args, **named)

    verdict = held.verdict(Wrong(nano_bundle, reference.engine), given, 4)
    assert not verdict["passed"]
    flat = np.zeros((2, 8, 8), np.uint8)
    assert gate.psnr(flat + np.uint8(51), flat) == pytest.approx(20 * np.log10(5), abs=1e-6)


def test_probe_in_a_process_of_its_own() -> None:
    peaks = probe.measure((64,))
    assert 0.01 < peaks["fp32"]["gflops"] < 1e5
    assert probe.peak_of(peaks, "fp32") == peaks["fp32"]["gflops"]
    assert probe.peak_of(peaks, "int8") == peaks["bf16"]["gflops"]
    assert probe.peak_of({}, "fp32") is None


def test_verdict_names_drift_and_company() -> None:
    fast: Peaks = {"fp32": {"gflops": 200.0}}
    slow: Peaks = {"fp32": {"gflops": 170.0}}
    quiet = {"others": 0.01, "stolen": 0.0}
    assert validity.verdict(fast, fast, quiet) == {"valid": True, "reasons": []}
    (drift,) = validity.verdict(fast, slow, quiet)["reasons"]
    assert "200 to 170" in drift
    (company,) = validity.verdict(fast, fast, {"others": 0.4, "stolen": None})["reasons"]
    assert "40 %" in company


def test_watch_counts_own_work() -> None:
    """A child that was waited for counts as own work."""
    watch = validity.Watch()
    subprocess.run([sys.executable, "-c", "sum(i * i for i in range(2_000_000))"], check=True)
    used = watch.read()
    if used["own"] is None:
        pytest.skip("this system does not count processor time in /proc/stat")
    assert used["own"] > 0
    assert used["wall_s"] > 0
    json.dumps(used)
