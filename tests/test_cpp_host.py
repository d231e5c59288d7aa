"""The C++ host: built here, its random numbers to the bit, its clip beside Python's."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from heartbeat_fast import Conditions, Generator
from heartbeat_fast.bundle import Bundle, describe
from heartbeat_fast.speckle import texture

HOME = Path(__file__).parents[1] / "examples" / "cpp"
SEED = 2**40 + 11  # two words of entropy, and not the default


def _compare() -> ModuleType:
    """examples/cpp/compare.py, which is no package."""
    spec = importlib.util.spec_from_file_location("cpp_compare", HOME / "compare.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = _compare()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built as docs/bundle.md says."""
    if not shutil.which("cmake") or not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no cmake or no C++ compiler here: the C++ host was NOT tested")
    build = tmp_path_factory.mktemp("cpp")
    for command in (["cmake", "-S", HOME, "-B", build], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stdout + done.stderr
    return build / "heartbeat_host"


def everything(frames: int, size: int) -> dict[str, Any]:
    """All seven conditions, each different in each place."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    labels = np.zeros((frames, size, size), np.uint8)
    for t in range(frames):
        labels[t, 10 : 30 + t, 20:40] = 1
        labels[t, 30 + t : 50, 20:40] = 3
    chance = np.random.default_rng(4)
    return {
        "text": "An ECHO with  4-chamber view, isn't it?",
        "ef": 61.5,
        "image": x * y,
        "sketch": (abs(x - y) < 0.05).astype(np.float32),
        "mask": labels,
        "skeleton": np.repeat((abs(y - 0.5) < 0.02).astype(np.float32)[None], frames, 0),
        "flow": chance.normal(0, 1.5, (frames, 2, size, size)).astype(np.float32),
    }


def run(host: Path, bundle: Bundle, given: dict[str, Any], folder: Path, **options: Any) -> float:
    """Decibels between the host's clip and Python's."""
    conditions = Conditions(**given, frames=bundle.manifest.frames, size=bundle.manifest.size)
    extra = {"seed": SEED, "threads": 1, **options}
    came = compare.run_host(host, bundle.path, conditions, folder, **extra)
    keys = ("seed", "steps", "sampler", "temperature")
    generator = Generator.open(bundle, engine="onnxruntime")
    wanted = generator(conditions, **{key: extra[key] for key in keys if key in extra}).frames
    assert wanted.std() > 5  # black equals black, whatever was computed
    # A mean over the clip would pass over a few pixels that are wholly wrong.
    assert abs(came.astype(int) - wanted).max() <= 4
    return float(compare.psnr(came, wanted))


@pytest.mark.parametrize(
    ("names", "sampler", "steps"),
    [
        ("text ef image sketch mask skeleton flow", "dpmpp_2m", 4),
        ("flow", "unipc", 5),
        ("text", "euler", 2),
        ("", "ddim", 3),
    ],
)
def test_same_clip_as_python(
    host: Path, nano_bundle: Bundle, tmp_path: Path, names: str, sampler: str, steps: int
) -> None:
    known = everything(nano_bundle.manifest.frames, nano_bundle.manifest.size)
    given = {name: known[name] for name in names.split()}
    decibels = run(host, nano_bundle, given, tmp_path, sampler=sampler, steps=steps)
    assert decibels >= compare.LEAST


def test_a_table_without_a_short_form(host: Path, nano_bundle: Bundle, tmp_path: Path) -> None:
    folder = shutil.copytree(nano_bundle.path, tmp_path / "dense")
    samplers = json.loads((folder / "samplers.json").read_text())
    samplers["tables"] = [{**t, "multistep": None} for t in samplers["tables"] if t["steps"] == 3]
    (folder / "samplers.json").write_text(json.dumps(samplers))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["samplers"] = vars(describe(folder / "samplers.json"))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    options = {"sampler": "dpmpp_2m", "steps": 3, "temperature": 1.0}
    assert run(host, Bundle.open(folder), {"ef": 30.0}, tmp_path, **options) >= compare.LEAST


def test_noise_to_the_bit(host: Path, nano_bundle: Bundle, tmp_path: Path) -> None:
    manifest = nano_bundle.manifest
    conditions = Conditions(
        flow=everything(manifest.frames, manifest.size)["flow"],
        frames=manifest.frames,
        size=manifest.size,
    )
    noise, grain = tmp_path / "noise.npy", tmp_path / "grain.npy"
    options = {"seed": SEED, "steps": 1, "noise_out": noise, "texture_out": grain}
    compare.run_host(host, nano_bundle.path, conditions, tmp_path, **options)

    chance = np.random.Generator(np.random.PCG64(SEED))
    shape = (1, manifest.frames, *manifest.latent)
    common = chance.standard_normal((1, 1, *manifest.latent), np.float32)
    own = chance.standard_normal(shape, np.float32)
    shared = np.float32(manifest.shared_start)
    np.testing.assert_array_equal(
        np.load(noise), np.sqrt(shared) * common + np.sqrt(1 - shared) * own
    )
    stream = int(np.random.SeedSequence([SEED, 1]).generate_state(1)[0])
    wanted = texture(conditions.flow, manifest.frames, manifest.size, stream)
    # The sums are whole numbers, the same on every host; their square roots are rounded.
    np.testing.assert_allclose(np.load(grain), wanted, atol=5e-6)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "7"], "sampler: the bundle has none"),
        (["--text", "Ä"], "only ASCII"),
        (["--text", "z " * 90], "longer than 77 tokens"),
        (["--mask", "absent.npy"], "absent.npy: cannot be read"),
        (["--mask", "odd.npy"], "odd.npy: wanted another shape"),
        (["--colour", "red"], "option --colour: unknown"),
        (["--runtime", "nowhere.so"], "ONNX Runtime: "),
        (["--bundle", "nowhere"], r"manifest.json: cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    host: Path, nano_bundle: Bundle, tmp_path: Path, option: list[str], message: str
) -> None:
    np.save(tmp_path / "odd.npy", np.zeros((3, 3), np.uint8))
    command = [host, "--bundle", nano_bundle.path, "--runtime", compare.library(), "--out", "x.npy"]
    done = subprocess.run([*command, *option], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not (tmp_path / "x.npy").exists()
