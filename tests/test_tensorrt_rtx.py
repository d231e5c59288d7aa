"""TensorRT-RTX for real, without a GPU: every graph becomes a plan, and says what it is."""

import hashlib
import json
from pathlib import Path

import pytest

from heartbeat_export.cli import main
from heartbeat_export.tensorrt_builder import build_all
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import cuda
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.tensorrt_plan import TENSORRT_RTX, Recipe, build
from heartbeat_fast.engines.tensorrt_rtx_engine import PORTABLE, TensorRtRtxEngine
from heartbeat_fast.errors import EngineError
from tests.fake_tensorrt import API

rtx = pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: tensorrt-rtx)"
)
no_gpu = pytest.mark.skipif(cuda.count() > 0, reason="a GPU is here: this is about having none")


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def test_every_graph_builds_for_every_target(nano_bundle: Bundle, cache: EngineCache) -> None:
    built = list(build_all(TENSORRT_RTX, nano_bundle, [PORTABLE], cache=cache))
    assert [one.graph for one in built] == list(nano_bundle.manifest.graphs)
    for one in built:
        # A plan holds the weights: it cannot be much smaller than the graph they came in.
        assert one.plan_bytes > one.onnx_bytes / 2
        assert not one.cached
        assert one.seconds > 0
    assert len(list(cache.entries())) == len(built)
    again = list(build_all(TENSORRT_RTX, nano_bundle, [PORTABLE], cache=cache))
    assert all(one.cached for one in again)


def test_a_plan_is_of_its_graph_and_targets(nano_bundle: Bundle) -> None:
    """The same twice, another for other weights, another for other targets."""
    content = nano_bundle.read(nano_bundle.manifest.graphs["time"])
    plans = [build(TENSORRT_RTX, content, Recipe((t,))) for t in ("SM86", "SM86", "SM89")]
    plans.append(build(TENSORRT_RTX, content, PORTABLE))
    digests = [hashlib.sha256(plan).hexdigest() for plan in plans]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@no_gpu
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(("SM86",), refit=True), "a plan for refitting needs a GPU to build, none here"),
        (Recipe(), "no GPU here to build for: name a target such as SM86"),
        (Recipe(("SM90",)), "target SM90 came; tensorrt_rtx builds SM75, SM80"),
    ],
)
def test_what_cannot_be_built_is_refused(recipe: Recipe, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build(TENSORRT_RTX, b"", recipe)


@no_gpu
def test_the_library_itself_refuses_to_build_for_refitting(nano_bundle: Bundle) -> None:
    """Why the recipe is refused above; when this fails, that can go."""
    trt = rtx
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, log).parse(nano_bundle.read(nano_bundle.manifest.graphs["time"]))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    config.set_flag(trt.BuilderFlag.REFIT)
    assert builder.build_serialized_network(network, config) is None


def test_graphs_that_are_refused(nano_bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match=r"graph time: tensorrt_rtx cannot parse it: .*parse the ONNX"
    ):
        build(TENSORRT_RTX, b"junk", PORTABLE, "time")
    with pytest.raises(EngineError, match="takes no plugins of ours: export the standard flavour"):
        build(TENSORRT_RTX, b"plugin_namespace", PORTABLE)


@no_gpu
def test_the_engine_says_why_it_does_not_run(nano_bundle: Bundle) -> None:
    can, why = TensorRtRtxEngine.available()
    assert not can
    assert "0 GPUs here" in why
    with pytest.raises(EngineError, match="wanted cuda or cuda:N, 0 GPUs here"):
        TensorRtRtxEngine.open(nano_bundle, "cuda")


def test_the_stand_in_is_this_library(nano_bundle: Bundle) -> None:
    """Its list of names against the library: what it has, this has."""
    version = f"rtx {rtx.__version__}"
    if version not in API:
        pytest.skip(f"the list is of {', '.join(API)}; {version} is installed")
    for kind, names in API[version].items():
        found = getattr(rtx, kind)
        here = set(getattr(found, "__members__", None) or dir(found))
        assert set(names.split()) <= here, kind


def test_the_command(
    nano_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEARTBEAT_CACHE", str(tmp_path / "engines"))
    out = tmp_path / "engines.json"
    build_time = ["engines", "build", str(nano_bundle.path), "--graph", "time"]
    assert main([*build_time, "--target", "SM86", "--target", "SM89", "--json", str(out)]) == 0
    said = json.loads(out.read_text())
    (row,) = said["plans"]
    assert (row["graph"], row["targets"]) == ("time", ["SM86", "SM89"])
    assert row["plan_bytes"] > 0
    assert said["fingerprint"]["software"]["tensorrt_rtx"] == rtx.__version__
    assert main(build_time) == 0
    capsys.readouterr()
    assert main(["engines", "list"]) == 0
    listed = capsys.readouterr().out
    assert listed.count("nano time") == 2
    assert "SM86 SM89" in listed
    assert main(["engines", "doctor"]) == 0
    assert str(tmp_path / "engines") in capsys.readouterr().out
    assert main([*build_time[:3], "--target", "SM90"]) == 2
    assert "target SM90 came" in capsys.readouterr().err
    assert main(["engines", "clear"]) == 0
    assert "2 engines" in capsys.readouterr().out


def test_random_weights_of_a_preset_build(capsys: pytest.CaptureFixture[str]) -> None:
    """The road of `base`, which no test has time for: half precision, one graph at a time."""
    command = ["engines", "build", "--random", "nano", "--graph", "time"]
    assert main([*command, "--target", "SM86", "--target", "SM120", "--each"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 4
    assert "3 plans" in said
    assert main(["engines", "build", "--random", "vast"]) == 2
    assert "preset: 'vast' came" in capsys.readouterr().err
