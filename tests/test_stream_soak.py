"""The soak's own arithmetic and clients: what they report is what there was."""

import numpy as np
import pytest

pytest.importorskip("psutil", reason="psutil comes with [bench]")
pytest.importorskip("pyigtl", reason="pyigtl comes with [serve]")

from pathlib import Path

from heartbeat_benchmarks import flicker
from heartbeat_benchmarks.soak import lines, slope
from heartbeat_benchmarks.soak_clients import Bad, Pyigtl, Steady
from heartbeat_fast.controls import Settings
from heartbeat_fast.generator import Generator
from heartbeat_fast.serve.igtl import IgtlServer
from heartbeat_fast.stream import Session
from tests.fixtures_toy import ToyEngine, toy_bundle


def test_slope_is_found_within_its_interval() -> None:
    rng = np.random.default_rng(0)
    seconds = np.arange(0, 600, 0.5)
    for rise in (0.0, 3.0):
        memory = 500 + rise * seconds / 60 + rng.standard_normal(len(seconds))
        memory[:100] -= 200  # the warm-up
        found = slope(list(zip(seconds.tolist(), memory.tolist(), strict=True)))
        low, high = found["interval"]
        assert low - 0.05 <= rise <= high + 0.05
        assert high - low < 0.3
    assert slope([(0.0, 1.0), (1.0, 2.0)])["interval"] is None


def test_clients_measure_and_misbehave_while_frames_go_on(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy")
    with (
        Session(Generator(bundle, ToyEngine(bundle)), Settings(steps=1), anatomy=3) as session,
        IgtlServer(session, port=0, rate=25) as server,
    ):
        session.frame()
        bad = [Bad(server.port, 2.0, seed) for seed in range(3)]
        for one in bad:
            one.start()
        steady = Steady(server.port, 2.0)
        steady.run()
        polling = Pyigtl(server.port, 2.0)
        polling.run()
        for one in bad:
            one.join(20)
    assert len(steady.ages) > 20
    assert len(polling.ages) > 5
    assert 0 < min(steady.ages) < 1000
    assert np.median(np.diff(steady.stamps)) == pytest.approx(1 / 25, abs=0.04)
    assert sum(sum(one.deeds.values()) for one in bad) >= 3


def test_flicker_sees_the_joint_and_the_change(tmp_path: Path) -> None:
    bundle = toy_bundle(tmp_path / "toy", frames=16)
    rows = flicker.run(Generator(bundle, ToyEngine(bundle)), 2, Settings(steps=2))
    for row in rows:
        assert 0 < row["joint"] <= row["within"]
        assert 0 < row["change"] < row["within"] + row["apart"]
    assert rows[0] != rows[1]
    assert "joint" in flicker.line(rows)


def test_words_name_what_was_measured() -> None:
    client = {"age_ms": {"n": 3, "p50": 1.25}, "gap_ms": {"n": 2}, "late_gaps": 1}
    session = {"missed_deadlines": 2, "frames_due": 100, "clips": 3, "changes": 4, "faults": 0}
    result = {
        "engine": {"name": "toy", "precision": "fp32"},
        "session": {**session, "change_to_first_frame_s": {"n": 1, "max": 0.4}},
        "blocking": [client],
        "pyigtl": [],
        "deeds": {"killed": 5},
        "flicker": [],
        "memory": {"first_mb": 10.0, "last_mb": 11.0, "slope_mb_min": 0.1, "interval": [-0.2, 0.4]},
    }
    said = "\n".join(lines(result))
    assert "2 of 100 frames missed" in said
    assert "age, ms: n 3, p50 1.25" in said
    assert "+0.10 MiB a minute (95 %: -0.20 to +0.40)" in said
