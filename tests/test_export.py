"""Export: a folder in, a bundle past the gate out, or nothing; and what fingerprints tell apart."""

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from heartbeat_export import build, fingerprints, parity
from heartbeat_export.build import build_bundle, weights_of
from heartbeat_export.cli import main
from heartbeat_export.to_onnx import ExportError, to_onnx, weights_to_half
from heartbeat_fast.bundle import GRAPHS, Bundle
from heartbeat_fast.engines.onnxruntime_engine import OnnxRuntimeEngine
from heartbeat_fast.errors import BundleError, HeartBeatError
from heartbeat_fast.models import graphs as graph_module
from heartbeat_fast.models.config import NANO
from heartbeat_fast.models.graphs import build_graphs, example_inputs, round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer


def test_manifest_says_what_the_bundle_is(nano_bundle: Bundle, nano_model: HeartBeat) -> None:
    manifest = nano_bundle.manifest
    assert tuple(manifest.graphs) == GRAPHS
    assert (manifest.preset, manifest.latent, manifest.licence) == ("nano", (4, 8, 8), "Apache-2.0")
    assert manifest.fingerprints["weights"] == weights_of(nano_model)
    assert set(manifest.parity["relative_l2"]) == set(GRAPHS)
    assert max(manifest.parity["relative_l2"].values()) <= parity.MAX_ERROR
    assert manifest.parity["clip_psnr_db"] >= parity.MIN_PSNR
    assert manifest.provenance == {"data": "none: random weights"}
    assert "Not for diagnosis" in (nano_bundle.path / "README.md").read_text()


def test_gate_of_a_large_bundle_holds_one_graph_at_a_time(
    nano_bundle: Bundle, nano_model: HeartBeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {name: {k: v.numpy() for k, v in given.items()}
              for name, given in example_inputs(nano_model).items()}  # fmt: skip
    whole = parity.engine_for(nano_bundle, nano_model)
    monkeypatch.setattr(parity, "LARGE", 0)
    engine = parity.engine_for(nano_bundle, nano_model)
    assert isinstance(engine, OnnxRuntimeEngine)
    assert engine.name == whole.name
    for graph in ("text", "time", "text"):
        got, wanted = engine.run(graph, inputs[graph]), whole.run(graph, inputs[graph])
        assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
        assert list(engine._sessions) == [graph]


def test_signatures_chain(nano_bundle: Bundle) -> None:
    """What one graph puts out, the next takes: same names, same shapes."""
    specs = nano_bundle.manifest.graphs
    makers = {t.name: t for graph in specs.values() for t in graph.outputs}
    for taker, made in [("context", "text_context"), ("context", "image_context"),
                        ("denoise", "temb"), ("denoise", "local")]:  # fmt: skip
        assert makers[made] in specs[taker].inputs
    kv = specs["context"].outputs
    assert specs["denoise"].inputs[-len(kv) :] == kv
    assert specs["denoise"].outputs[0].shape == specs["denoise"].inputs[0].shape


def test_weights_are_half_and_nothing_of_this_machine_is_inside(nano_bundle: Bundle) -> None:
    for name, spec in nano_bundle.manifest.graphs.items():
        content = nano_bundle.read(spec)
        model = onnx.load_from_string(content)
        kinds = {TensorProto.FLOAT16: 0, TensorProto.FLOAT: 0}
        for tensor in model.graph.initializer:
            if np.prod(tensor.dims) >= graph_module.HALF_FROM and tensor.data_type in kinds:
                kinds[tensor.data_type] += 1
        # The rest are tables, not weights: the causal mask, the decoder's positions.
        assert kinds[TensorProto.FLOAT16] > 0
        assert kinds[TensorProto.FLOAT] <= 1, name
        assert str(Path(__file__).parents[1]).encode() not in content


def test_only_lossless_weights_become_half() -> None:
    exact = np.linspace(0, 1, 2048, dtype=np.float16).astype(np.float32)
    weights = {"exact": exact, "rough": exact + np.float32(1e-6), "few": exact[:8],
               "huge": np.full(2048, 1e6, np.float32)}  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in weights],
        "g", [], [], [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph)
    weights_to_half(model)
    halves = [t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT16]
    assert halves == ["exact.half"]
    assert (model.graph.node[0].op_type, model.graph.node[0].output[0]) == ("Cast", "exact")


def test_rounding_refuses_what_half_cannot_hold() -> None:
    model = HeartBeat(NANO)
    with torch.no_grad():
        model.denoiser.conv_out.weight[0, 0] = 1e5
    with pytest.raises(HeartBeatError, match=r"denoiser.conv_out.weight: exceeds half"):
        round_to_half(model)


@pytest.fixture
def folder(nano_model: HeartBeat, nano_tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model folder as training leaves it."""
    path = tmp_path / "model"
    nano_model.save_pretrained(path)
    nano_tokenizer.save(path / "tokenizer.json")
    (path / "provenance.json").write_text(json.dumps({"steps": 3}))
    (path / "README.md").write_text("# the card")
    return path


@pytest.fixture
def exported(nano_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs come from the session's bundle: tracing them anew costs a quarter of a minute."""
    by_outputs = {
        tuple(tensor.name for tensor in spec.outputs): spec
        for spec in nano_bundle.manifest.graphs.values()
    }
    monkeypatch.setattr(
        build,
        "to_onnx",
        lambda part, *_, **__: onnx.load_from_string(nano_bundle.read(by_outputs[part.outputs])),
    )


@pytest.mark.usefixtures("exported")
def test_command_from_folder_to_bundle(
    folder: Path, nano_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bundle"
    assert main(["onnx", str(folder), "--out", str(out), "--name", "mine"]) == 0
    bundle = Bundle.open(out)
    bundle.verify()
    assert bundle.manifest.name == "mine"
    assert bundle.manifest.provenance == {"steps": 3}
    assert (out / "README.md").read_text() == "# the card"
    # The same model is the same bundle, whichever way it came.
    assert bundle.manifest.fingerprints == nano_bundle.manifest.fingerprints
    assert "8 graphs" in capsys.readouterr().out
    manifest = bundle.manifest
    assert (manifest.precision, manifest.flavour, manifest.opset) == ("fp32", "standard", 21)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: shutil.rmtree(path), "model"),
        (lambda path: (path / "tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda path: (path / "provenance.json").write_text("{"), "provenance.json"),
    ],
)
def test_a_broken_folder_is_one_line(
    damage: object, message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)  # type: ignore[operator]
    assert main(["onnx", str(folder), "--out", str(tmp_path / "bundle")]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


@pytest.mark.usefixtures("exported")
def test_a_failing_gate_writes_nothing(
    nano_model: HeartBeat,
    nano_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "MAX_ERROR", 0.0)
    with pytest.raises(ExportError, match=r"parity: graph .* from torch; at most 0"):
        build_bundle(nano_model, nano_tokenizer, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_the_gate() -> None:
    parity.gate({"text": 1e-4}, 45.0)
    with pytest.raises(ExportError, match=r"graph text is 2.00e-03 from torch"):
        parity.gate({"local": 1e-4, "text": 2e-3}, 45.0)
    with pytest.raises(ExportError, match=r"graph text is inf"):
        parity.gate({"text": parity.relative_error(np.array([np.nan]), np.ones(1))}, 45.0)
    with pytest.raises(ExportError, match=r"clip at 39.0 dB"):
        parity.gate({"text": 1e-4}, 39.0)


def test_the_gate_of_a_lower_precision_is_wider_but_no_door() -> None:
    parity.gate({"text": 4e-3}, 36.0, "fp16")
    parity.gate({"text": 3e-2}, 26.0, "bf16")
    with pytest.raises(ExportError, match=r"at most 0.005 passes"):
        parity.gate({"text": 6e-3}, 60.0, "fp16")
    with pytest.raises(ExportError, match=r"at most 0.04 passes"):
        parity.gate({"text": 5e-2}, 60.0, "bf16")
    with pytest.raises(ExportError, match=r"at least 25.0 passes"):
        parity.gate({"text": 1e-2}, 24.0, "bf16")


def test_a_full_disk_writes_nothing(
    nano_model: HeartBeat,
    nano_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BundleError, match=r"not written \(No space left on device\)"):
        build_bundle(nano_model, nano_tokenizer, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_arch_ignores_weights_and_names(nano_model: HeartBeat) -> None:
    inputs = example_inputs(nano_model)["context"]
    torch.manual_seed(1)
    other = round_to_half(HeartBeat(NANO))
    one, two = (to_onnx(build_graphs(m)["context"], inputs) for m in (nano_model, other))
    assert fingerprints.arch({"context": one}) == fingerprints.arch({"context": two})
    for node in two.graph.node:
        node.name = f"renamed_{node.name}"
    assert fingerprints.arch({"context": one}) == fingerprints.arch({"context": two})
    two.graph.node[0].op_type = "Identity"
    assert fingerprints.arch({"context": one}) != fingerprints.arch({"context": two})


def test_arch_sees_a_wider_layer(nano_model: HeartBeat) -> None:
    wide = HeartBeat(replace(NANO, codec=replace(NANO.codec, widths=(8, 16, 24))))
    z = example_inputs(nano_model)["encode"]
    one, two = (to_onnx(build_graphs(model)["encode"], z) for model in (nano_model, wide))
    assert fingerprints.arch({"encode": one}) != fingerprints.arch({"encode": two})


def test_weights_fingerprint_is_of_the_tensors_alone() -> None:
    tensors = {f"w{i}": np.full((2, i + 1), i, np.float32) for i in range(5)}
    root = fingerprints.weights(tensors)
    assert fingerprints.weights(dict(reversed(tensors.items()))) == root
    assert fingerprints.weights({**tensors, "w3": tensors["w3"] + np.float32(1e-6)}) != root
    assert fingerprints.weights({**tensors, "w3": tensors["w3"].reshape(-1)}) != root
    assert fingerprints.weights({k: v for k, v in tensors.items() if k != "w4"}) != root
    changed = fingerprints.leaves({**tensors, "w3": tensors["w3"] + 1})
    before = fingerprints.leaves(tensors)
    assert [name for name in before if before[name] != changed[name]] == ["w3"]
