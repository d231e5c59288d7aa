"""The command line: the main job, every kind of wrong input, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heartbeat_export.parity import beating_ring
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.cli import main

SHARED = Path(__file__).parents[2] / "shared"
CAMUS = SHARED / "data/camus_a4c/database_nifti/patient0001/patient0001_4CH_half_sequence.nii.gz"
F, S = 4, 64


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """Condition files of a ring, in the formats a user would have."""
    ring = beating_ring(F, S)
    folder = tmp_path / "in"
    folder.mkdir()
    labels = [Image.fromarray(frame) for frame in ring.mask]
    labels[0].save(folder / "mask.png")
    np.save(folder / "mask.npy", ring.mask)
    np.save(folder / "flow.npy", ring.flow)
    np.savez(folder / "valve.npz", skeleton=ring.skeleton, other=1)
    for name in ("image", "sketch"):
        pixels = (getattr(ring, name) * 255).astype(np.uint8)
        Image.fromarray(pixels).resize((90, 70)).save(folder / f"{name}.png")
    return folder


def sample(bundle: Bundle, *options: object) -> int:
    return main(["sample", "--bundle", str(bundle.path), "--steps", "2", *map(str, options)])


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_phantom_to_clip_with_facts_and_preview(
    nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, facts = tmp_path / "demo.gif", tmp_path / "demo.json"
    code = sample(nano_bundle, "--from", "phantom:7", "--seed", 1, "--out", out, "--preview",
                  "--json", facts)  # fmt: skip
    assert code == 0
    assert left(tmp_path) == ["demo.gif", "demo.json", "demo.preview.gif"]
    assert Image.open(out).n_frames == F
    told = json.loads(facts.read_text())
    assert (told["seed"], told["source"]) == (1, "phantom:7")
    assert told["engine"] in ("openvino", "onnxruntime")  # auto's choice is the machine's
    assert {"text", "ef", "image", "sketch", "mask", "flow"} <= set(told["conditions"])
    assert told["timings_ms"]["denoise"] > 0
    printed = capsys.readouterr().out
    assert str(out) in printed
    assert "denoise" in printed


def test_conditions_from_their_own_files(
    nano_bundle: Bundle, tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"image": "image.png", "sketch": "sketch.png", "mask": "mask.png",
             "skeleton": "valve.npz", "flow": "flow.npy"}  # fmt: skip
    options = [part for name, file in files.items() for part in (f"--{name}", inputs / file)]
    code = sample(nano_bundle, *options, "--text", "An ECHO.", "--ef", 40, "--out",
                  tmp_path / "x.npz", "--json")  # fmt: skip
    assert code == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["conditions"]) == 7
    with np.load(tmp_path / "x.npz") as clip:
        assert clip["frames"].shape == (F, S, S)
        assert (clip["mask"] == beating_ring(F, S).mask[0]).all()  # one frame holds for the clip
        assert float(clip["ef"]) == 40


def test_a_subset_is_picked_and_files_replace_the_record(
    nano_bundle: Bundle, tmp_path: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.npz"
    sample(nano_bundle, "--from", "phantom:3", "--conditions", "mask, sketch", "--mask",
           inputs / "mask.npy", "--out", out, "--json")  # fmt: skip
    assert json.loads(capsys.readouterr().out)["conditions"] == ["sketch", "mask"]
    with np.load(out) as clip:
        assert (clip["mask"] == beating_ring(F, S).mask).all()


def test_extract_and_sample_from_it(nano_bundle: Bundle, tmp_path: Path) -> None:
    found, out = tmp_path / "found.npz", tmp_path / "clip.png"
    assert main(["extract", "--from", "phantom:3", "--out", str(found)]) == 0
    with np.load(found) as arrays:
        assert arrays["frames"].shape == (16, 256, 256)
        assert {"mask", "flow", "sketch", "image", "text"} <= set(arrays)
        assert "provenance" not in arrays  # it is no synthetic clip of ours
    assert sample(nano_bundle, "--from", found, "--conditions", "mask,flow", "--out", out) == 0
    assert Image.open(out).size == (F * S, S)


@pytest.mark.skipif(not CAMUS.exists(), reason="needs ../shared/data/camus_a4c")
def test_a_real_patient(
    nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "mask,sketch,skeleton,flow,image,text"
    out = tmp_path / "clip.gif"
    assert sample(nano_bundle, "--from", CAMUS, "--conditions", names, "--out", out, "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["conditions"]) == set(names.split(","))


def test_same_seed_same_file(nano_bundle: Bundle, tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        sample(nano_bundle, "--text", "An ECHO.", "--seed", 4, "--out", tmp_path / name)
    a, b = (np.load(tmp_path / name)["frames"] for name in ("a.npz", "b.npz"))
    assert (a == b).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "nowhere.nii.gz"], "no such file"),
        (["--from", "unicorn:7"], "sources: phantom:SEED"),
        (["--from", "phantom:seven"], "seed 'seven' came; wanted a whole number"),
        (["--from", "{in}/broken.png"], "not readable"),
        (["--from", "{in}/empty.png"], "0 bytes"),
        (["--from", "phantom:7", "--window", "5"], "wanted START:STOP"),
        (["--from", "phantom:7", "--window", "0:99"], "wanted within 0:4"),
        (["--window", "0:9"], "wanted --from FILE with it"),
        (["--from", "phantom:7", "--conditions", "mask,colour"], "colour unknown; wanted any of"),
        (["--text", "x", "--conditions", "mask"], "mask asked for but not given"),
        (["--mask", "nowhere.npy"], "no such file"),
        (["--mask", "{in}/image.png"], "wanted labels 0 background"),
        (["--mask", "{in}/three.npy"], "3 frames came; wanted 1 or 4"),
        (["--mask", "{in}/zero.npy"], "all zero"),
        (["--mask", "{in}/small.npy"], "32 rows x 32 columns came; wanted 64 x 64"),
        (["--mask", "{in}/object.npy"], "not readable as mask"),
        (["--flow", "{in}/nan.npy"], "NaN"),
        (["--flow", "{in}/mask.png"], "wanted flow as .npy or .npz"),
        (["--skeleton", "{in}/two.npz"], "holds a, b; wanted skeleton"),
        (["--ef", "140"], "ef: 140 came; wanted percent, 0 to 100"),
        (["--ef", "high"], "invalid float value"),
        (["--text", "heart " * 90], "wanted at most 77"),
        (["--steps", "7"], "steps: 7 came"),
        (["--sampler", "plms"], "sampler: 'plms' came"),
        (["--seed", "-1"], "wanted both 0 or more"),
        (["--engine", "warp"], "engine: 'warp' came; wanted auto, openvino, onnxruntime, torch"),
        (["--engine", "torch:nowhere"], "nowhere"),
        (["--device", "abacus"], "device: 'abacus' came"),
        (["--bundle", "nowhere"], "no readable manifest.json"),
        (["--preview", "x.npz"], "a preview is a picture"),
        (["--preview", "x.bmp"], "unknown suffix"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_exit_2(
    options: list[str], message: str, nano_bundle: Bundle, inputs: Path,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    (inputs / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    (inputs / "empty.png").touch()
    ring = beating_ring(F, S)
    np.save(inputs / "three.npy", ring.mask[:3])
    np.save(inputs / "zero.npy", np.zeros_like(ring.mask))
    np.save(inputs / "small.npy", ring.mask[:, ::2, ::2])
    np.save(inputs / "object.npy", np.array([{}]))  # a pickle inside
    np.save(inputs / "nan.npy", ring.flow * np.nan)
    np.savez(inputs / "two.npz", a=1, b=2)
    _assert_refused(
        lambda: sample(
            nano_bundle, "--out", tmp_path / "clip.gif",
            *[option.format(**{"in": inputs}) for option in options],
        ),
        message, tmp_path, capsys,
    )  # fmt: skip


def _assert_refused(
    call: object, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = call()  # type: ignore[operator]
    except SystemExit as leaving:  # argparse
        code = leaving.code
    said = capsys.readouterr().err
    assert code == 2
    assert message in said
    assert said.count("\n") == 1, said
    assert left(folder) == []


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_bundle(
    damage: str, nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(nano_bundle.path, copy)
    path = copy / "denoise.onnx"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if damage == "truncated" else content[:-1] + b"?")
    message = f"denoise.onnx is {damage}"
    _assert_refused(
        lambda: sample(Bundle.open(copy), "--text", "x", "--out", tmp_path / "clip.gif"),
        message, tmp_path, capsys,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "npz"])
def test_a_full_disk(
    suffix: str,
    nano_bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    _assert_refused(
        lambda: sample(nano_bundle, "--text", "x", "--out", tmp_path / f"clip.{suffix}"),
        "No space left on device", tmp_path, capsys,
    )  # fmt: skip


def test_an_unwritable_place_is_asked_before_the_work(
    nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _assert_refused(
        lambda: sample(nano_bundle, "--from", "nowhere", "--out", tmp_path / "clip.bmp"),
        "clip.bmp: unknown suffix", tmp_path, capsys,
    )  # fmt: skip


def test_doctor(nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--bundle", str(nano_bundle.path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ready"]
    assert told["engines"]["onnxruntime"]["available"]
    assert "phantom" in told["sources"]
    assert main(["doctor", "--bundle", str(tmp_path)]) == 1
    words = capsys.readouterr().out
    assert "no readable manifest.json" in words
    assert "not ready" in words


def test_help_is_quick_and_the_runtime_has_no_torch(nano_bundle: Bundle, tmp_path: Path) -> None:
    help_ = "import sys, heartbeat_fast.cli; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", help_], check=False).returncode == 0
    script = (
        "import sys; from heartbeat_fast.cli import main;"
        f"code = main(['sample', '--bundle', {str(nano_bundle.path)!r}, '--steps', '1',"
        f" '--text', 'x', '--out', {str(tmp_path / 'x.gif')!r}]);"
        "assert code == 0;"
        "sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_source_that_lacks_its_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Point:
        def load(self) -> None:
            raise ModuleNotFoundError("No module named 'cv2'", name="cv2")

    monkeypatch.setattr("heartbeat_fast.inputs.sources", lambda: {"phantom": Point()})
    assert main(["sample", "--from", "phantom:7", "--out", "clip.gif"]) != 0
    assert "needs cv2: pip install 'heartbeat_fast[media]'" in capsys.readouterr().err
