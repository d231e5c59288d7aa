"""New weights and what engines had compiled of the old: refitted, built or stale, never served.

TensorRT is a stand-in here (see test_tensorrt.py for what that shows); TensorRT-RTX builds for
real where it is installed, and OpenVINO compiles for real.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heartbeat_export import tensorrt_builder
from heartbeat_export.cli import main
from heartbeat_export.rebuild import rebuild
from heartbeat_export.tensorrt_builder import build_all
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines import auto, cuda
from heartbeat_fast.engines.cache import EngineCache
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.engines.openvino_engine import OpenVinoEngine, quantised_facts
from heartbeat_fast.engines.tensorrt_engine import TensorRtEngine
from heartbeat_fast.engines.tensorrt_plan import TENSORRT, TENSORRT_RTX, Recipe, build, facts
from heartbeat_fast.engines.tensorrt_rtx_engine import PORTABLE, TensorRtRtxEngine
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from tests.fake_tensorrt import stand_in
from tests.test_rebuild import trained

GRAPHS = ("time", "denoise", "decode")  # the decoder does not change below
Install = Callable[..., Any]
KINDS: dict[str, tuple[str, type[TensorRtEngine], Recipe, tuple[int, int]]] = {
    "10.14": ("10.14.1.48", TensorRtEngine, Recipe(), (9, 0)),
    "11.4": ("11.4.0.106", TensorRtEngine, Recipe(), (9, 0)),
    "rtx": ("rtx 1.7.1.116", TensorRtRtxEngine, PORTABLE, (8, 9)),
}


@pytest.fixture
def bundle(nano_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(nano_bundle.path, tmp_path / "bundle"))


@pytest.fixture
def checkpoints(nano_model: HeartBeat, nano_tokenizer: Tokenizer, tmp_path: Path) -> list[Path]:
    """Three model folders whose denoisers differ; the first is the bundle's."""
    models = [nano_model, *(trained(nano_model, "denoiser.", seed=seed) for seed in (1, 2))]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"model{i}")
        nano_tokenizer.save(tmp_path / f"model{i}/tokenizer.json")
        (tmp_path / f"model{i}/provenance.json").write_text("{}")
    return [tmp_path / f"model{i}" for i in range(3)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """The user's own, empty."""
    monkeypatch.setenv("HEARTBEAT_CACHE", str(tmp_path / "engines"))
    return EngineCache()


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(version, gpus=…, capability=…): a stand-in for a library and its GPU; returns it."""

    def put(version: str, **hardware: Any) -> Any:
        return stand_in(monkeypatch, version, **hardware)[1]

    return put


def actions(rows: list[dict[str, Any]], engine: str = "tensorrt") -> dict[str, str]:
    return {row["graph"]: row["action"] for row in rows if row["engine"] == engine}


def why(rows: list[dict[str, Any]], graph: str) -> str:
    return next(str(row["why"]) for row in rows if row["graph"] == graph)


def outputs(engine: Any, bundle: Bundle) -> dict[str, Any]:
    """What the graphs make of fixed inputs."""
    out = {}
    for graph in GRAPHS:
        chance = np.random.default_rng(0)
        specs = bundle.manifest.graphs[graph].inputs
        given = {s.name: chance.standard_normal(s.shape).astype(np.float32) for s in specs}
        out[graph] = next(iter(engine.run(graph, given).values()))
    return out


def check_new(kind: type[TensorRtEngine], folder: Path, old: Bundle) -> None:
    """An engine opened now computes with the folder's weights, not with the old ones."""
    now = Bundle.open(folder)
    got, wanted = outputs(kind(now, "cuda"), now), outputs(OnnxRuntimeEngine.open(now), now)
    before = outputs(OnnxRuntimeEngine.open(old), old)
    for graph in GRAPHS:
        np.testing.assert_allclose(got[graph], wanted[graph], rtol=1e-4, atol=1e-5)
    assert not np.allclose(got["denoise"], before["denoise"], rtol=1e-2)


@pytest.mark.parametrize("version", KINDS)
def test_plans_with_masters_are_refitted_and_never_built_again(
    version: str, install: Install, bundle: Bundle, cache: EngineCache, checkpoints: list[Path]
) -> None:
    library, kind, recipe, capability = KINDS[version]
    trt = install(library, capability=capability)
    master = Recipe(recipe.targets, refit=True)
    list(build_all(kind.family, bundle, [recipe, master], GRAPHS, cache))
    built = len(trt.built)
    first = Bundle.open(bundle.path)
    for checkpoint in checkpoints[1:]:  # the second refit finds the master of the first
        rows = rebuild(bundle.path, checkpoint).engines
        name = kind.name
        assert actions(rows, name) == {"time": "refitted", "denoise": "refitted", "decode": "kept"}
        check_new(kind, bundle.path, first)
        now = Bundle.open(bundle.path).manifest.graphs["denoise"].sha256
        gpu = None if recipe.targets else cuda.Gpu.find("cuda")
        assert cache.get(facts(kind.family, now, recipe, gpu)) is not None
    # Weights that were here before are found, by a rebuild and by a rollback.
    rows = rebuild(bundle.path, checkpoints[0]).engines
    assert set(actions(rows, kind.name).values()) == {"found", "kept"}
    assert main(["rollback", "--bundle", str(bundle.path)]) == 0
    check_new(kind, bundle.path, first)
    assert len(trt.built) == built


def test_without_a_master_the_next_open_builds(
    install: Install, bundle: Bundle, cache: EngineCache, checkpoints: list[Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    trt = install("11.4.0.106")
    old = Bundle.open(bundle.path)
    list(build_all(TENSORRT, bundle, [Recipe()], GRAPHS, cache))
    asked = ["rebuild", str(checkpoints[1]), "--bundle", str(bundle.path)]
    assert main([*asked, "--dry-run", "--json"]) == 0
    foreseen = json.loads(capsys.readouterr().out)["engines"]
    assert main([*asked, "--explain"]) == 0
    said = capsys.readouterr().out
    assert "engine tensorrt: decode kept: its graph did not change" in said
    stale = next(line for line in said.splitlines() if " stale: " in line)
    assert stale.startswith("engine tensorrt: ")
    assert "no master to refit: heartbeat-export engines build" in stale
    assert actions(foreseen) == {"time": "stale", "denoise": "stale", "decode": "kept"}
    assert len(trt.built) == 3
    check_new(TensorRtEngine, bundle.path, old)
    assert len(trt.built) == 5  # time and denoise


def test_warm_builds_before_the_switch(
    install: Install, bundle: Bundle, cache: EngineCache, checkpoints: list[Path]
) -> None:
    trt = install("11.4.0.106")
    old = Bundle.open(bundle.path)
    list(build_all(TENSORRT, bundle, [Recipe()], GRAPHS, cache))
    rows = rebuild(bundle.path, checkpoints[1], warm=True).engines
    assert actions(rows) == {"time": "built", "denoise": "built", "decode": "kept"}
    assert len(trt.built) == 5
    check_new(TensorRtEngine, bundle.path, old)
    assert len(trt.built) == 5


@pytest.mark.parametrize(
    ("hurt", "reason"),
    [
        ("no GPU", "needs a GPU to build, none here"),
        ("another driver", ""),
        ("wrong weights", "refitted, it was .* from torch, which does not pass"),
        ("refused", "1 weights folded into constants"),
    ],
)
def test_what_cannot_be_refitted_is_stale_and_says_why(
    hurt: str, reason: str, install: Install, bundle: Bundle, cache: EngineCache,
    checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    install("11.4.0.106")
    old = Bundle.open(bundle.path)
    list(build_all(TENSORRT, bundle, [Recipe(), Recipe(refit=True)], GRAPHS, cache))
    refit = tensorrt_builder.refit
    if hurt == "no GPU":
        install("11.4.0.106", gpus=0)
    elif hurt == "another driver":
        monkeypatch.setattr(
            cuda.Gpu, "find", lambda _: cuda.Gpu(0, "Stand-in GPU", "SM90", driver=1)
        )
    elif hurt == "wrong weights":  # as where a refit of a refit mixed old and new

        def stuck(family: Any, master: bytes, proto: Any, weights: Any, name: str) -> bytes:
            was = build(TENSORRT, old.read(old.manifest.graphs[name]), Recipe(refit=True))
            before = type(proto).FromString(old.read(old.manifest.graphs[name]))
            return refit(family, was, before, weights, name)

        monkeypatch.setattr(tensorrt_builder, "refit", stuck)
    else:
        monkeypatch.setattr(
            tensorrt_builder, "refit", lambda f, m, p, w, n: refit(f, m, p, [*w, "folded"], n)
        )
    rows = rebuild(bundle.path, checkpoints[1]).engines
    if hurt == "another driver":  # its plans are not this machine's: nothing can load them
        assert actions(rows) == {}
        return
    assert actions(rows) == {"time": "stale", "denoise": "stale", "decode": "kept"}
    assert re.search(reason, why(rows, "denoise")), why(rows, "denoise")
    now = Bundle.open(bundle.path).manifest.graphs["denoise"].sha256
    install("11.4.0.106")
    assert cache.get(facts(TENSORRT, now, Recipe(), cuda.Gpu.find("cuda"))) is None


def test_a_cache_that_others_can_write_to_is_not_looked_into(
    install: Install, bundle: Bundle, cache: EngineCache, checkpoints: list[Path]
) -> None:
    install("11.4.0.106")
    list(build_all(TENSORRT, bundle, [Recipe()], GRAPHS, cache))
    cache.folder.chmod(0o777)
    report = rebuild(bundle.path, checkpoints[1], dry_run=True)
    assert (report.road, report.engines) == ("swap", [])


def test_a_traced_graph_is_not_refitted(
    install: Install, bundle: Bundle, cache: EngineCache, checkpoints: list[Path]
) -> None:
    from heartbeat_export.decide import Checkpoint, decide
    from heartbeat_export.local_engines import Follower
    from heartbeat_export.to_onnx import Recipe as Export

    install("11.4.0.106")
    list(build_all(TENSORRT, bundle, [Recipe(), Recipe(refit=True)], GRAPHS, cache))
    checkpoint = Checkpoint.open(checkpoints[1])
    decision = decide(bundle, checkpoint, Export(opset=23))
    foreseen = Follower(bundle, decision, checkpoint.model, cache).foresee()
    assert {row.action for row in foreseen} == {"stale"}
    assert "traced anew" in foreseen[0].why


def test_tensorrt_rtx_builds_new_weights_in_seconds(
    bundle: Bundle, cache: EngineCache, checkpoints: list[Path]
) -> None:
    """For real: without a GPU no plan can be refitted, and a new one needs none."""
    pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed (extra: tensorrt-rtx)"
    )
    if cuda.count():
        pytest.skip("a GPU is here: this is about having none")
    list(build_all(TENSORRT_RTX, bundle, [PORTABLE], ("time", "decode"), cache))
    rows = rebuild(bundle.path, checkpoints[1]).engines
    assert actions(rows, "tensorrt_rtx") == {"time": "stale", "decode": "kept"}
    assert "tensorrt_rtx: a plan for refitting needs a GPU" in why(rows, "time")
    again = list(build_all(TENSORRT_RTX, Bundle.open(bundle.path), [PORTABLE], ("time",), cache))
    assert [one.cached for one in again] == [False]

    rows = rebuild(bundle.path, checkpoints[2], warm=True).engines
    assert actions(rows, "tensorrt_rtx") == {"time": "built", "decode": "kept"}
    now = Bundle.open(bundle.path)
    spec = now.manifest.graphs["time"]
    plan = cache.get(facts(TENSORRT_RTX, spec.sha256, PORTABLE, None))
    assert plan == build(TENSORRT_RTX, now.read(spec), PORTABLE, "time")


@pytest.mark.skipif(not OpenVinoEngine.available()[0], reason="OpenVINO is not installed")
def test_openvino_and_auto_are_ready_where_warm_is_asked(
    bundle: Bundle, cache: EngineCache, checkpoints: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    Generator.open(bundle, "auto")
    cache.put(quantised_facts(bundle, "denoise"), b"packed", "denoise in int8 for OpenVINO")
    rows = rebuild(bundle.path, checkpoints[1]).engines
    stale = {
        row["graph"] for row in rows if (row["engine"], row["action"]) == ("openvino", "stale")
    }
    assert "denoise" in stale
    assert "decode" not in stale
    (int8,) = (row for row in rows if row["engine"] == "openvino:int8")
    assert int8["action"] == "stale"
    assert f"heartbeat-export quantise --bundle {bundle.path}" in int8["why"]

    Generator.open(bundle.path, "auto")  # asks for these weights too
    rows = rebuild(bundle.path, checkpoints[2], warm=True).engines
    built = {
        row["graph"] for row in rows if (row["engine"], row["action"]) == ("openvino", "built")
    }
    assert built == stale
    rows = rebuild(bundle.path, checkpoints[0], dry_run=True).engines
    assert {row["action"] for row in rows if row["engine"] == "openvino"} == {"kept", "stale"}
    monkeypatch.setattr(auto, "graph_errors", lambda *_: pytest.fail("compared again"))
    monkeypatch.setattr(EngineCache, "put", lambda *_: pytest.fail("compiled again"))
    engine = Generator.open(bundle.path, "auto").engine
    now = Bundle.open(bundle.path)
    np.testing.assert_allclose(
        outputs(engine, now)["decode"],
        outputs(OnnxRuntimeEngine.open(now), now)["decode"],
        atol=0.1,
    )
    monkeypatch.undo()
    monkeypatch.setenv("HEARTBEAT_CACHE", str(cache.folder))
    rows = rebuild(bundle.path, checkpoints[0]).engines  # what the first open compiled
    assert {row["action"] for row in rows if row["engine"] == "openvino"} == {"kept", "found"}
