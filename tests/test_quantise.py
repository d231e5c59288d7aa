"""`heartbeat-export quantise` as it is typed: refused by the gate, let through, run, of no use to
other weights."""

import json
import shutil
from pathlib import Path

import pytest

from heartbeat_export import quantise as int8
from heartbeat_export.cli import main
from heartbeat_export.parity import beating_ring, psnr
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.openvino_engine import QUANTISED, OpenVinoEngine, quantised_facts
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator
from tests.test_rebuild_reload import switch

pytest.importorskip("nncf", reason="needs the extra quantise")
if "int8" not in OpenVinoEngine.precisions():
    pytest.skip("OpenVINO has no int8 on this processor", allow_module_level=True)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, tuple[bytes, int]]:
    """One clip to calibrate on and one held out; a graph is quantised once and then remembered."""
    monkeypatch.setenv("HEARTBEAT_CACHE", str(tmp_path / "engines"))
    monkeypatch.setattr(int8, "CALIBRATION", {900_001: None})
    monkeypatch.setattr(int8, "HELD_OUT", {900_101: None})
    made: dict[str, tuple[bytes, int]] = {}
    graph = int8._graph
    monkeypatch.setattr(
        int8,
        "_graph",
        lambda bundle, name, seen: (
            made.get(name) or made.setdefault(name, graph(bundle, name, seen))
        ),
    )
    return made


def test_the_command(
    quick: dict[str, tuple[bytes, int]],
    nano_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = Bundle.open(shutil.copytree(nano_bundle.path, tmp_path / "bundle"))
    ring = beating_ring(bundle.manifest.frames, bundle.manifest.size)
    with pytest.raises(EngineError, match=r"no int8 of bundle nano .*: heartbeat-export quantise"):
        Generator.open(bundle, "openvino:int8")(ring, steps=2)
    figures = tmp_path / "int8.json"
    asked = ["quantise", "--bundle", str(bundle.path), "--steps", "4", "--json", str(figures)]

    monkeypatch.setattr(int8, "MIN_PSNR", 98.0)
    assert main(asked) == 2
    assert "int8: held-out clips at" in capsys.readouterr().err
    assert not figures.exists()
    assert set(quick) == set(QUANTISED)
    assert EngineCache().get(quantised_facts(bundle, "denoise")) is None

    monkeypatch.setattr(int8, "MIN_PSNR", 20.0)  # random weights spread wider than trained ones
    assert main(asked) == 0
    said = json.loads(figures.read_text())
    assert "bundle nano: openvino:int8 is ready" in capsys.readouterr().out
    assert all(said["layers"][graph] > 4 for graph in QUANTISED)
    frames = Generator.open(bundle, "openvino:int8")(ring, steps=2).frames
    exact = Generator.open(bundle, "openvino:fp32")(ring, steps=2).frames
    assert 20 < psnr(frames, exact) < 99  # 99: nothing was quantised

    switch(bundle, 0.5)  # other weights
    with pytest.raises(EngineError, match="heartbeat-export quantise"):
        Generator.open(bundle.path, "openvino:int8")(ring, steps=2)
