"""The gate of new weights, and the bytes it reads: a wrong number anywhere must show."""

import copy
import json
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from heartbeat_export import fingerprints, parity, quick_gate, smaller, store, weight_map
from heartbeat_export.build import weights_of
from heartbeat_export.errors import ExportError
from heartbeat_export.onnx_bytes import Bytes, outline, patched
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.engines.base import Arrays
from heartbeat_fast.models.graphs import round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from tests.test_rebuild import trained


def entries(bundle: Bundle, graph: str) -> dict[str, Any]:
    content = json.loads(bundle.read(bundle.manifest.files["weights_map"]))
    return dict(content["graphs"][graph])


def test_every_graph_of_a_right_bundle_passes(nano_bundle: Bundle, nano_model: HeartBeat) -> None:
    engine = parity.engine_for(nano_bundle, nano_model)
    found = quick_gate.measure(nano_bundle, engine, nano_model, nano_bundle.manifest.graphs)
    assert set(found) == set(nano_bundle.manifest.graphs)
    assert max(found.values()) < 1e-5


def test_a_wrong_weight_anywhere_fails_at_the_smaller_size(
    nano_bundle: Bundle, nano_model: HeartBeat
) -> None:
    """Each weight of the denoiser in turn with its numbers in another order."""
    content = store.mapped(nano_bundle, nano_bundle.manifest.graphs["denoise"])
    graph, inputs = smaller.SmallerGraph(content), quick_gate._Inputs(nano_bundle, nano_model)
    given = inputs.of(graph.inputs)
    assert given["z"].shape[-1] * smaller.BY == nano_bundle.manifest.latent[-1]
    wanted = inputs.reference.run("denoise", given)["out"]
    assert parity.relative_error(graph.run("denoise", given)["out"], wanted) < 1e-5
    rng, errors = np.random.default_rng(0), {}
    for name, numbers in graph.weights.items():
        wrong = rng.permutation(numbers.reshape(-1)).reshape(numbers.shape)
        if not np.array_equal(wrong, numbers):  # one number, or all alike
            got = graph.run("denoise", given | {name: wrong})["out"]
            errors[name] = parity.relative_error(got, wanted)
    assert len(errors) > 50
    assert {n: e for n, e in errors.items() if not e > parity.MAX_ERROR} == {}


def test_a_missing_transform_fails(nano_bundle: Bundle, nano_model: HeartBeat) -> None:
    """Square weights in the file as the checkpoint lays them out, not as the graph wants them."""
    content = store.mapped(nano_bundle, nano_bundle.manifest.graphs["denoise"])
    graph, inputs = smaller.SmallerGraph(content), quick_gate._Inputs(nano_bundle, nano_model)
    given = inputs.of(graph.inputs)
    wanted = inputs.reference.run("denoise", given)["out"]
    square = [
        name
        for name, entry in entries(nano_bundle, "denoise").items()
        if ["transpose", 1, 0] in entry["transform"] and len(set(entry["shape"])) == 1
    ]
    assert square
    for name in square:
        got = graph.run("denoise", given | {name: graph.weights[name].T.copy()})["out"]
        assert parity.relative_error(got, wanted) > parity.MAX_ERROR, name


def test_a_large_bundle_is_gated_at_the_smaller_size_and_fails_there_and_at_its_own(
    nano_bundle: Bundle, nano_model: HeartBeat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "LARGE", 0)
    engine = parity.engine_for(nano_bundle, nano_model)
    loaded: list[str] = []
    run = engine.run

    def noted(graph: str, given: Arrays) -> Arrays:
        loaded.append(graph)
        return run(graph, given)

    monkeypatch.setattr(engine, "run", noted)
    right = quick_gate.measure(nano_bundle, engine, nano_model, ["denoise"])
    assert right["denoise"] < 1e-5
    assert loaded == []  # what runs is the smaller graph alone
    other = trained(nano_model, "denoiser.up_blocks.0.resnets.0.conv1")
    wrong = quick_gate.measure(nano_bundle, engine, other, ["denoise", "context"])
    assert loaded == ["context", "denoise"]  # one takes no picture, the other did not pass
    assert wrong["context"] < 1e-5
    with pytest.raises(ExportError, match="graph denoise is"):
        parity.gate(wrong, None)


def test_a_graph_that_cannot_be_followed_says_so(nano_bundle: Bundle) -> None:
    content = store.mapped(nano_bundle, nano_bundle.manifest.graphs["time"])
    with pytest.raises(ExportError, match="without pictures"):
        smaller.SmallerGraph(content)
    proto = onnx.load_from_string(nano_bundle.read(nano_bundle.manifest.graphs["denoise"]))
    del proto.graph.value_info[:]
    with pytest.raises(ExportError, match="without a shape"):
        smaller.resize(proto)


def test_new_weights_in_pieces_are_the_file_that_onnx_writes(
    nano_bundle: Bundle, nano_model: HeartBeat
) -> None:
    state = trained(nano_model, "denoiser").state_dict()
    for name, spec in nano_bundle.manifest.graphs.items():
        content, wanted = store.mapped(nano_bundle, spec), entries(nano_bundle, name)
        proto = onnx.load_from_string(content.tobytes())
        spans = outline(content).initializers
        for tensor in proto.graph.initializer:
            span = spans[tensor.name]
            assert content[span.begin : span.end].tobytes() == tensor.raw_data
            assert span.dtype == tensor.data_type
        new: dict[str, Bytes] = {}
        for key, entry in wanted.items():
            found = weight_map.difference(content, spans[key], key, entry, state)
            if found is not None:
                new[key] = found
        assert bool(new) == (name in ("local", "context", "time", "denoise"))
        weight_map.apply(proto, wanted, state)
        assert b"".join(map(bytes, patched(content, spans, new))) == proto.SerializeToString()


def test_a_map_that_is_not_the_files_is_refused(nano_bundle: Bundle, nano_model: HeartBeat) -> None:
    content = store.mapped(nano_bundle, nano_bundle.manifest.graphs["decode"])
    name, entry = next(iter(entries(nano_bundle, "decode").items()))
    span, state = outline(content).initializers[name], nano_model.state_dict()
    for wrong in (span._replace(end=span.end - 2), span._replace(dtype=span.dtype + 1)):
        with pytest.raises(ExportError, match="is not what it says"):
            weight_map.difference(content, wrong, name, entry, state)
    state = {**state, entry["tensor"]: state[entry["tensor"]] + 1e6}
    if entry["dtype"] == "float16":
        with pytest.raises(ExportError, match="exceeds float16"):
            weight_map.difference(content, span, name, entry, state)


def test_the_fingerprint_is_that_of_the_rounded_model(nano_model: HeartBeat) -> None:
    model = trained(nano_model, "")  # numbers that half cannot hold
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = fingerprints.of_model(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert found == weights_of(round_to_half(copy.deepcopy(model)))
    with torch.no_grad():
        next(p for p in model.parameters() if p.numel() >= 1024).view(-1)[7] = 1e6
    with pytest.raises(ExportError, match="exceeds half"):
        fingerprints.of_model(model)


def test_numbers_that_are_none_are_found() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        for kind in (torch.float16, torch.float32, torch.bfloat16):
            tensor = torch.zeros(100, dtype=kind)
            assert weight_map.finite(tensor)
            tensor[57] = bad
            assert not weight_map.finite(tensor)
    assert weight_map.finite(torch.empty(0))
