"""heartbeat-bench: light to import, honest about samples, whole results, one line per mistake."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from heartbeat_benchmarks import cli, quality, results
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_benchmarks.pictures import draw
from heartbeat_benchmarks.timing import needed, summary, supported
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.errors import FileError
from heartbeat_training.evaluate import LADDER, SETS, TARGETS

Labels = NDArray[np.uint8]


def test_import_is_light() -> None:
    """--help must not wait for torch, OpenCV or a phantom."""
    code = "import sys, heartbeat_benchmarks.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"torch", "cv2", "onnxruntime", "rich", "diffusers"} & set(loaded.stdout.split())


def test_latency_needs_no_torch() -> None:
    code = "import sys, heartbeat_benchmarks.latency; print('torch' in sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "False"


def test_percentiles_only_where_supported() -> None:
    assert [needed(q) for q in (0.5, 0.9, 0.95, 0.99)] == [7, 44, 90, 459]
    for quantile in (0.5, 0.9, 0.95):
        assert supported(quantile, needed(quantile))
        assert not supported(quantile, needed(quantile) - 1)
    few, many = summary(range(10)), summary(range(1, 101))
    assert few.keys() == {"n", "min", "max", "p50"}
    assert many["p50"] == pytest.approx(50.5)
    assert many["p90"] == pytest.approx(90.1)
    assert "p99" not in many
    assert summary([]) == {"n": 0}


def test_fingerprint_says_where(nano_bundle: Bundle) -> None:
    found = fingerprint(nano_bundle)
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["cpu"]
    assert "numpy" in found["software"]
    assert set(found["bundle"]["graphs_sha256"]) == set(nano_bundle.manifest.graphs)
    json.dumps(found)


def test_results_are_whole_and_never_overwritten(tmp_path: Path) -> None:
    content = {"fingerprint": {"source": {"commit": "0123456789"}}, "x": np.float32("nan")}
    path = results.save("quality", content, tmp_path)
    assert path.name.endswith("-01234567.json")
    assert results.load(path)["x"] is None
    assert results.newest("quality", tmp_path) == path
    assert results.newest("quality", tmp_path, weights="other") is None
    assert results.newest("latency", tmp_path) is None
    path.write_text("[]")
    with pytest.raises(FileError, match="not a result"):
        results.load(path)


def test_insert_fills_only_its_place(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- bench:ladder -->\nold\n<!-- /bench -->\nb\n")
    assert results.insert(page, "ladder", results.markdown(["x", "y"], [["1", "2"]]))
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("<!-- /bench -->\nb\n")
    assert "| 1 | 2 |" in text
    assert not results.insert(page, "latency", "t")


def test_a_place_may_ask_for_one_bundles_result(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- bench:real{of} -->\n<!-- /bench -->\n" for of in ("", " of a")))
    assert results.places(page, "real") == ["", "a"]
    assert results.places(page, "ladder") == []
    for name in ("a", "b"):  # "b" is newer
        content = {"fingerprint": {"source": {"commit": name}, "bundle": {"name": name}}}
        results.save("real", content, tmp_path)
    newest = results.newest("real", tmp_path)
    assert newest is not None
    of = results.newest("real", tmp_path, of="a")
    assert of is not None
    assert (newest.name[-6:], of.name[-6:]) == ("b.json", "a.json")
    assert results.newest("real", tmp_path, of="c") is None
    assert results.insert(page, "real of a", "table")
    assert "of a -->\ntable\n" in page.read_text()


@pytest.fixture(scope="module")
def judged(nano_bundle: Bundle) -> dict[str, Any]:
    def judge(frames: Labels) -> Labels:
        """Calls what is dark and near the middle the ventricle."""
        out = np.zeros(frames.shape, np.uint8)
        out[:, 20:40, 20:44] = frames[:, 20:40, 20:44] < 128
        return out

    return quality.run(nano_bundle.path, judge, quality.Plan(clips=3, steps=4))


def test_quality_result(judged: dict[str, Any], tmp_path: Path) -> None:
    """Every set for every heart; source and twin are their own yardsticks."""
    assert len(judged["rows"]) == 3 * (len(SETS) + 2)
    summaries = judged["summary"]
    assert set(summaries) == {"source", "twin", *SETS}
    assert summaries["source"]["ssim"] == pytest.approx(1)
    assert summaries["twin"]["ssim_share"] == pytest.approx(1)
    assert summaries["source"]["speckle_gap"] == 0
    assert len(judged["targets"]) == len(TARGETS)
    assert len(quality.verdicts(judged)) == len(TARGETS)
    saved = results.load(results.save("quality", judged, tmp_path))
    ladder = quality.ladder_markdown(saved)
    assert all(f"| {name} |" in ladder for name in LADDER)
    assert "same heart, other speckle" in quality.targets_markdown(saved)
    assert quality.table(saved).row_count == len(summaries)


def test_tables_fill_documents(
    judged: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.save("quality", judged, tmp_path)
    page = tmp_path / "README.md"
    page.write_text(
        "<!-- bench:ladder -->\n<!-- /bench -->\n<!-- bench:latency -->\n<!-- /bench -->\n"
    )
    assert cli.main(["tables", str(page), "--results", str(tmp_path)]) == 0
    assert "| +flow |" in page.read_text()
    assert "no latency result" in capsys.readouterr().err


def test_pictures(nano_bundle: Bundle, tmp_path: Path) -> None:
    written = draw(nano_bundle.path, tmp_path, steps=4)
    assert {path.name for path in written} == {
        "beside.gif",
        "mmode.png",
        "conditions.gif",
        "ladder.png",
        "phantoms.png",
    }
    for path in written:
        with Image.open(path) as image:
            assert image.width > 64


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["latency", "--sets", "text,+nothing"], "+nothing"),
        (["latency", "--bundle", "nowhere"], "no readable manifest.json"),
        (["quality", "--sets", "sketch only"], "wanted any of text"),
        (["pictures", "--bundle", "nowhere"], "no readable manifest.json"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(options) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


def test_targets_know_their_side() -> None:
    by_figure: dict[str, Callable[..., bool]] = {t.figure: t.kept for t in TARGETS}
    assert by_figure["dice"]({"dice": 0.9})
    assert not by_figure["dice"]({"dice": 0.8})
    assert by_figure["spectrum_gap"]({"spectrum_gap": 1.0})
    assert not by_figure["spectrum_gap"]({"spectrum_gap": float("nan")})
