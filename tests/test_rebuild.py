"""New weights in a bundle: the right road, a full export's clip, and the way back to the byte."""

import copy
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from heartbeat_export import build, decide, parity, quick_gate, store, weight_map
from heartbeat_export import rebuild as rebuild_module
from heartbeat_export.build import build_bundle
from heartbeat_export.cli import main
from heartbeat_export.decide import Checkpoint, Road
from heartbeat_export.errors import ExportError
from heartbeat_export.parity import beating_ring
from heartbeat_export.rebuild import Report, rebuild
from heartbeat_export.store import StoreError
from heartbeat_export.to_onnx import Recipe
from heartbeat_fast.bundle import Bundle, describe
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.errors import BundleError, HeartBeatError
from heartbeat_fast.generator import Generator
from heartbeat_fast.models.config import NANO, HeartBeatConfig
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer, train_tiny_tokenizer

PROVENANCE = {"data": "none: random weights"}
Save = Callable[..., Path]


def trained(model: HeartBeat, *parts: str, seed: int = 1) -> HeartBeat:
    """A copy whose weights under these prefixes have moved, as training moves them."""
    made, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.startswith(parts):
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    return made


def configured(model: HeartBeat, config: HeartBeatConfig) -> HeartBeat:
    """The weights under another configuration, as far as its shapes allow."""
    made = HeartBeat(config)
    wanted, state = made.state_dict(), model.state_dict()
    fits = {k: t for k, t in state.items() if k in wanted and wanted[k].shape == t.shape}
    made.load_state_dict(fits, strict=False)
    return made.eval()


@pytest.fixture
def bundle(nano_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A copy of the nano bundle to rebuild."""
    return Bundle.open(shutil.copytree(nano_bundle.path, tmp_path / "bundle"))


@pytest.fixture
def save(nano_tokenizer: Tokenizer, tmp_path: Path) -> Save:
    """Writes a model folder as training leaves it."""

    def write(
        model: HeartBeat, name: str = "checkpoint", tokenizer: Tokenizer = nano_tokenizer
    ) -> Path:
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer.save(folder / "tokenizer.json")
        (folder / "provenance.json").write_text(json.dumps(PROVENANCE))
        return folder

    return write


def clip(folder: Path) -> NDArray[np.uint8]:
    opened = Bundle.open(folder)
    conditions = beating_ring(opened.manifest.frames, opened.manifest.size)
    return Generator(opened, OnnxRuntimeEngine.open(opened))(conditions, steps=2, seed=3).frames


def contents(folder: Path) -> dict[str, bytes]:
    """What the bundle's manifest names, by key."""
    opened = Bundle.open(folder)
    named = {**opened.manifest.graphs, **opened.manifest.files}
    return {key: opened.read(spec) for key, spec in named.items()}


@pytest.mark.usefixtures("exported")
def test_new_weights_make_the_clip_of_a_full_export(
    bundle: Bundle, nano_model: HeartBeat, nano_tokenizer: Tokenizer, save: Save, tmp_path: Path
) -> None:
    """With graphs traced once (test_rebuild_drill.py traces them anew, for a trained model)."""
    model = trained(nano_model, "denoiser", "flow")
    before = clip(bundle.path)
    report = rebuild(bundle.path, save(model))
    assert report.road == "swap"
    said = "graph local: new weights in denoiser.conv_in.weight, flow.conv_in.bias"
    assert report.reasons[0].startswith(said)
    assert set(report.changed) == {"local", "context", "time", "denoise"}
    assert max(report.parity["relative_l2"].values()) <= parity.MAX_ERROR
    assert len(report.build) == 64

    after = Bundle.open(bundle.path)
    after.verify()
    build_bundle(model, nano_tokenizer, tmp_path / "full", provenance=PROVENANCE)
    full = Bundle.open(tmp_path / "full")
    assert np.array_equal(clip(bundle.path), clip(full.path))
    assert not np.array_equal(clip(bundle.path), before)
    for name in ("arch", "weights"):
        assert after.manifest.fingerprints[name] == full.manifest.fingerprints[name]
    # What did not change is not written again.
    assert after.manifest.graphs["decode"] == bundle.manifest.graphs["decode"]
    assert report.written < sum(spec.bytes for spec in store.specs(after.manifest)) / 1.5


def test_there_and_back_is_the_same_to_the_byte(
    bundle: Bundle, nano_model: HeartBeat, save: Save
) -> None:
    first, manifest = contents(bundle.path), (bundle.path / "manifest.json").read_bytes()
    b = save(trained(nano_model, "denoiser.conv_out"), "b")
    assert rebuild(bundle.path, b).road == "swap"
    assert {key for key, value in contents(bundle.path).items() if value != first[key]} == {
        "denoise"
    }
    assert main(["rollback", "--bundle", str(bundle.path)]) == 0
    assert (bundle.path / "manifest.json").read_bytes() == manifest
    with pytest.raises(StoreError, match="no earlier version is kept"):
        store.rollback(bundle.path)

    assert rebuild(bundle.path, b).road == "swap"
    assert rebuild(bundle.path, save(nano_model, "a")).road == "swap"
    assert contents(bundle.path) == first
    again = Bundle.open(bundle.path).manifest
    assert again.graphs == bundle.manifest.graphs  # the files that were there, under their names
    store.rollback(bundle.path)
    store.rollback(bundle.path)
    assert (bundle.path / "manifest.json").read_bytes() == manifest


def same(model: HeartBeat) -> HeartBeat:
    return model


def denoiser(**changes: Any) -> Callable[[HeartBeat], HeartBeat]:
    return lambda model: configured(
        model, replace(NANO, denoiser=replace(NANO.denoiser, **changes))
    )


def config(**changes: Any) -> Callable[[HeartBeat], HeartBeat]:
    return lambda model: configured(model, replace(NANO, **changes))


def one_tensor(model: HeartBeat) -> HeartBeat:
    return trained(model, "codec.decoder.inside.bias")


ROADS = [
    ("nothing", same, "nothing", "weights, tables, tokenizer, card and provenance"),
    ("one tensor", one_tensor, "swap", "graph decode: new weights in codec.decoder.inside.bias"),
    ("stage 2", lambda m: trained(m, "flow."), "swap", "graph local: new weights in flow.conv_in"),
    ("a layer's width", config(codec=replace(NANO.codec, widths=(8, 16, 24))), "full",
     "codec.widths was [8, 16, 16], is [8, 16, 24]"),
    ("heads, which no shape shows", denoiser(heads=(2, 2)), "full",
     "architecture: denoiser.heads was [2, 4], is [2, 2]"),
    ("frames", config(frames=3), "full", "architecture: frames was 4, is 3"),
    ("another model", lambda m: HeartBeat(replace(NANO, local_hidden=8)), "full",
     "architecture: local_hidden was 16, is 8"),
    ("prediction", config(prediction="epsilon"), "files", "prediction: was v_prediction, is eps"),
    ("noise schedule", config(beta_end=0.02), "files", "samplers: differs"),
    ("shared start", config(shared_start=0.5), "files", "shared_start: was 1.0, is 0.5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "road", "reason"), [row[1:] for row in ROADS], ids=[row[0] for row in ROADS]
)
def test_the_road_of_a_model(
    change: Callable[[HeartBeat], HeartBeat],
    road: str,
    reason: str,
    nano_bundle: Bundle,
    nano_model: HeartBeat,
    nano_tokenizer: Tokenizer,
) -> None:
    checkpoint = Checkpoint(change(nano_model), nano_tokenizer, PROVENANCE, "")
    found = decide.decide(nano_bundle, checkpoint)
    assert found.road == road
    assert any(reason in line for line in found.reasons), found.reasons


@pytest.mark.parametrize(
    ("asked", "road", "reason"),
    [
        (Recipe("fp32", 21), "nothing", "are the bundle's"),
        (Recipe("fp16"), "full", "precision: the bundle's is fp32, wanted fp16"),
        (Recipe(opset=23), "full", "opset: the bundle's is 21, wanted 23"),
    ],
    ids=["as it is", "dtype", "opset"],
)
def test_the_road_of_a_recipe(
    asked: Recipe, road: str, reason: str, nano_bundle: Bundle, nano_model: HeartBeat,
    nano_tokenizer: Tokenizer,
) -> None:  # fmt: skip
    checkpoint = Checkpoint(nano_model, nano_tokenizer, PROVENANCE, "")
    found = decide.decide(nano_bundle, checkpoint, asked)
    assert found.road == road
    assert any(reason in line for line in found.reasons), found.reasons


def without(key: str) -> Callable[[Path], None]:
    def drop(folder: Path) -> None:
        data = json.loads((folder / "manifest.json").read_text())
        del data["files"][key]
        (folder / "manifest.json").write_text(json.dumps(data))

    return drop


def unmapped(folder: Path) -> None:
    """The map no longer knows a weight: as where an exporter had folded it into a constant."""
    file = folder / "weights_map.json"
    content = json.loads(file.read_text())
    entries = content["graphs"]["decode"]
    del entries[next(k for k, e in entries.items() if e["tensor"] == "codec.decoder.inside.bias")]
    rewrite(folder, "weights_map", json.dumps(content).encode())


def rewrite(folder: Path, key: str, content: bytes) -> None:
    manifest = Bundle.open(folder).manifest
    file = {**manifest.graphs, **manifest.files}[key].file
    (folder / file).write_bytes(content)
    spec = describe(folder / file)
    if key in manifest.graphs:
        graphs = {**manifest.graphs, key: store.named(manifest.graphs[key], spec)}
        manifest = replace(manifest, graphs=graphs)
    else:
        manifest = replace(manifest, files={**manifest.files, key: spec})
    (folder / "manifest.json").write_text(manifest.to_json())


def truncated(folder: Path) -> None:
    content = (folder / "time.onnx").read_bytes()
    (folder / "time.onnx").write_bytes(content[:-1])


def foreign(folder: Path) -> None:
    """A graph that the map was not made for."""
    graph = onnx.load_from_string((folder / "time.onnx").read_bytes())
    for tensor in graph.graph.initializer:
        renamed = f"other.{tensor.name}"
        for node in graph.graph.node:
            node.input[:] = [renamed if name == tensor.name else name for name in node.input]
        tensor.name = renamed
    rewrite(folder, "time", graph.SerializeToString())


@pytest.mark.parametrize(
    ("damage", "road", "reason"),
    [
        (without("weights_map"), "full", "no weights map: an older release"),
        (without("config"), "full", "no configuration: an older release"),
        (unmapped, "rebuild", "graph decode: codec.decoder.inside.bias cannot be put in by name"),
        (truncated, "full", "the bundle is not whole: bundle"),
        (foreign, "full", "graph time: weights map: the graph has no initializer"),
    ],
    ids=["no map", "no configuration", "folded constant", "truncated", "foreign graph"],
)
def test_the_road_of_a_bundle(
    damage: Callable[[Path], None], road: str, reason: str, bundle: Bundle,
    nano_model: HeartBeat, nano_tokenizer: Tokenizer,
) -> None:  # fmt: skip
    damage(bundle.path)
    model = trained(nano_model, "codec.decoder.inside.bias")
    checkpoint = Checkpoint(model, nano_tokenizer, PROVENANCE, "")
    found = decide.decide(Bundle.open(bundle.path), checkpoint)
    assert found.road == road
    assert any(reason in line for line in found.reasons), found.reasons


def test_twins_that_start_alike_take_their_own_weights(
    bundle: Bundle, nano_model: HeartBeat, save: Save
) -> None:
    """Two tensors of one shape hold the same zeros; training moves one, then the other."""
    twins = ["sketch.conv_out.bias", "skeleton.conv_out.bias"]
    zero = copy.deepcopy(nano_model)
    zero.load_state_dict({k: torch.zeros(16) for k in twins}, strict=False)
    rebuild(bundle.path, save(zero, "zero"))
    for twin in twins:
        report = rebuild(bundle.path, save(trained(zero, twin), twin))
        assert set(report.changed["local"]) == ({twin} if twin == twins[0] else set(twins))


def test_files_alone(bundle: Bundle, nano_model: HeartBeat, save: Save, tmp_path: Path) -> None:
    """Tokenizer and card change without a graph being touched, and come with the next version."""
    tokenizer = train_tiny_tokenizer(["Other words, of another hospital."], vocab_size=280)
    folder = save(nano_model, tokenizer=tokenizer)
    (folder / "README.md").write_text("# Another card")
    report = rebuild(bundle.path, folder)
    assert (report.road, report.changed) == ("files", {})
    assert sorted(line.split(":")[0] for line in report.reasons) == ["card", "tokenizer"]
    after = contents(bundle.path)
    assert after["card"] == b"# Another card"
    assert after["tokenizer"] == (folder / "tokenizer.json").read_bytes()
    assert Bundle.open(bundle.path).manifest.graphs == bundle.manifest.graphs


@pytest.fixture
def exported(nano_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs come from the session's bundle: tracing them costs a quarter of a minute. Lists those
    that were asked for."""
    asked: list[str] = []
    by_outputs = {
        tuple(tensor.name for tensor in spec.outputs): name
        for name, spec in nano_bundle.manifest.graphs.items()
    }

    def trace(part: Any, *_: Any, **__: Any) -> onnx.ModelProto:
        name = by_outputs[part.outputs]
        asked.append(name)
        proto = onnx.load_from_string(nano_bundle.read(nano_bundle.manifest.graphs[name]))
        entries = json.loads(nano_bundle.read(nano_bundle.manifest.files["weights_map"]))
        weight_map.apply(proto, entries["graphs"][name], part.module.model.state_dict())
        return proto

    monkeypatch.setattr(build, "to_onnx", trace)
    monkeypatch.setattr(rebuild_module, "to_onnx", trace)
    return asked


def test_a_folded_constant_has_its_graph_traced_anew(
    bundle: Bundle, nano_model: HeartBeat, save: Save, exported: list[str]
) -> None:
    unmapped(bundle.path)
    report = rebuild(bundle.path, save(one_tensor(nano_model)))
    assert report.road == "rebuild"
    # Which of the graphs with constants holds it is not known; those without cannot.
    assert "decode" in exported
    assert not {"context", "local"} & set(exported)
    after = Bundle.open(bundle.path)
    after.verify()
    assert after.manifest.fingerprints["arch"] == bundle.manifest.fingerprints["arch"]
    # The new map knows the weight again.
    assert rebuild(bundle.path, save(nano_model)).road == "swap"


def test_a_swap_that_misses_parity_becomes_a_full_export(
    bundle: Bundle, nano_model: HeartBeat, save: Save, exported: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(quick_gate, "measure", lambda *_: {"denoise": 0.5})
    report = rebuild(bundle.path, save(trained(nano_model, "denoiser.conv_out")))
    assert report.road == "full"
    assert "swap is not enough: parity: graph denoise is 5.00e-01" in report.reasons[-1]
    assert sorted(exported) == sorted(bundle.manifest.graphs)
    Bundle.open(bundle.path).verify()
    assert Bundle.open(bundle.path).manifest.fingerprints["weights"] == report.after


@pytest.mark.usefixtures("exported")
def test_where_nothing_passes_the_bundle_stays(
    bundle: Bundle, nano_model: HeartBeat, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (bundle.path / "manifest.json").read_bytes()
    monkeypatch.setattr(parity, "gate", lambda *_: (_ for _ in ()).throw(ExportError("no")))
    with pytest.raises(HeartBeatError, match="no"):
        rebuild(bundle.path, save(trained(nano_model, "denoiser.conv_out")))
    assert (bundle.path / "manifest.json").read_bytes() == before
    Bundle.open(bundle.path).verify()


def test_a_dry_run_writes_nothing(
    bundle: Bundle, nano_model: HeartBeat, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.path.iterdir()}
    asked = ["rebuild", str(save(one_tensor(nano_model))), "--bundle", str(bundle.path)]
    assert main([*asked, "--dry-run", "--explain"]) == 0
    said = capsys.readouterr().out
    assert "graph decode: new weights in codec.decoder.inside.bias" in said
    assert "road swap, nothing written" in said
    assert main([*asked, "--dry-run", "--json"]) == 0
    report = Report(**json.loads(capsys.readouterr().out))
    assert (report.road, report.dry_run, report.written) == ("swap", True, 0)
    assert report.changed == {"decode": ["codec.decoder.inside.bias"]}
    assert {path: path.stat().st_mtime_ns for path in bundle.path.iterdir()} == before


def test_a_busy_bundle_is_refused_in_a_sentence(
    bundle: Bundle, nano_model: HeartBeat, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["rebuild", str(save(nano_model)), "--bundle", str(bundle.path), "--no-wait"]
    with store.locked(bundle.path):
        assert main(asked) == 2
    assert "another rebuild is under way" in capsys.readouterr().err


def test_what_nothing_names_is_swept_and_what_is_not_ours_stays(
    bundle: Bundle, nano_model: HeartBeat, save: Save
) -> None:
    folder = bundle.path
    (folder / "notes.txt").write_text("a user's")
    (folder / f"denoise-{'0' * 16}.onnx").write_bytes(b"of a killed rebuild")
    (folder / ".denoise-abc.tmp").write_bytes(b"half a file")
    (folder / ".full-abc.tmp").mkdir()
    (folder / ".full-abc.tmp" / "x.onnx").write_bytes(b"of a killed export")
    for i in range(3):
        rebuild(folder, save(trained(nano_model, "denoiser.conv_out", seed=i), f"c{i}"))
    here = {path.name for path in folder.iterdir()}
    assert "notes.txt" in here
    assert not {f"denoise-{'0' * 16}.onnx", ".denoise-abc.tmp", ".full-abc.tmp"} & here
    assert "denoise.onnx" in here  # retired twice over, less than a minute ago
    for path in folder.glob("manifest-*.json"):
        os.utime(path, (time.time() - 2 * store.GRACE_S,) * 2)
    store.sweep(Bundle.open(folder))
    here = {path.name for path in folder.iterdir()}
    assert "denoise.onnx" not in here
    assert len([name for name in here if name.startswith("denoise-")]) == 2
    store.rollback(folder).verify()


def test_an_altered_earlier_version_is_not_put_back(
    bundle: Bundle, nano_model: HeartBeat, save: Save
) -> None:
    rebuild(bundle.path, save(one_tensor(nano_model)))
    now = (bundle.path / "manifest.json").read_bytes()
    decode = bundle.path / "decode.onnx"
    decode.write_bytes(decode.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"decode.onnx is altered"):
        store.rollback(bundle.path)
    kept = next(bundle.path.glob("manifest-*.json"))
    kept.write_bytes(kept.read_bytes() + b" ")
    with pytest.raises(BundleError, match="altered"):
        store.rollback(bundle.path)
    assert (bundle.path / "manifest.json").read_bytes() == now


def test_roads_are_in_order_of_cost() -> None:
    decision = decide.Decision()
    for road in (Road.SWAP, Road.FILES, Road.FULL, Road.REBUILD):
        decision.take(road, str(road))
    assert decision.road is Road.FULL
    assert decision.reasons == ["swap", "files", "full", "rebuild"]
