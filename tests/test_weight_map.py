"""Which tensor each weight of a bundle is: known, not guessed, and good for replacing it."""

import json
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from heartbeat_export import weight_map
from heartbeat_export.errors import ExportError
from heartbeat_export.to_onnx import to_onnx, trace, with_weights
from heartbeat_export.weight_sources import chain
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.models.config import NANO
from heartbeat_fast.models.graphs import Graph, build_graphs, example_inputs, round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat

Protos = dict[str, onnx.ModelProto]
TRACED = ("text", "local", "encode")  # a table, a slice of a weight, layers that start at zero


@pytest.fixture
def protos(nano_bundle: Bundle) -> Protos:
    """The nano bundle's graphs, to be altered."""
    return {
        name: onnx.load_from_string(nano_bundle.read(spec))
        for name, spec in nano_bundle.manifest.graphs.items()
    }


@pytest.fixture(scope="module")
def stored(nano_bundle: Bundle) -> dict[str, Any]:
    """The nano bundle's weights_map.json."""
    content: dict[str, Any] = json.loads(
        nano_bundle.read(nano_bundle.manifest.files["weights_map"])
    )
    return content


@pytest.fixture(scope="module")
def fresh() -> HeartBeat:
    """As a model starts: many layers are zero, and norms are alike."""
    torch.manual_seed(7)
    return round_to_half(HeartBeat(NANO).eval())


def test_the_bundle_holds_its_map(
    protos: Protos, stored: dict[str, Any], nano_model: HeartBeat
) -> None:
    assert weight_map.build(protos, nano_model) == stored
    entries = {key: entry for graph in stored["graphs"].values() for key, entry in graph.items()}
    assert {e["tensor"] for e in entries.values()} >= {k for k, _ in nano_model.named_parameters()}
    # Constants come from no weight: shapes, scales, a mask.
    for name, graph in protos.items():
        names = {tensor.name for tensor in graph.graph.initializer}
        assert names == stored["graphs"][name].keys() | stored["constants"][name].keys()


def test_the_same_weights_change_no_bit(
    protos: Protos, stored: dict[str, Any], nano_model: HeartBeat
) -> None:
    for name, proto in protos.items():
        before = proto.SerializeToString(deterministic=True)
        weight_map.apply(proto, stored["graphs"][name], nano_model.state_dict())
        assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("name", TRACED)
def test_other_weights_give_what_an_export_gives(
    name: str, protos: Protos, stored: dict[str, Any], nano_model: HeartBeat, fresh: HeartBeat
) -> None:
    """Zero and equal layers too; and back again is back."""
    before = protos[name].SerializeToString(deterministic=True)
    anew = to_onnx(build_graphs(fresh)[name], example_inputs(nano_model)[name])
    weight_map.apply(protos[name], stored["graphs"][name], fresh.state_dict())
    after = protos[name].SerializeToString(deterministic=True)
    assert after == anew.SerializeToString(deterministic=True) != before
    weight_map.apply(protos[name], stored["graphs"][name], nano_model.state_dict())
    assert protos[name].SerializeToString(deterministic=True) == before


def test_unrounded_weights_are_rounded_as_an_export_rounds_them(
    protos: Protos, stored: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    model = HeartBeat(NANO).eval()
    other = onnx.ModelProto()
    other.CopyFrom(protos["context"])
    weight_map.apply(protos["context"], stored["graphs"]["context"], model.state_dict())
    weight_map.apply(other, stored["graphs"]["context"], round_to_half(model).state_dict())
    assert protos["context"] == other


def test_a_graph_is_the_same_whatever_its_weights_are(fresh: HeartBeat) -> None:
    """An optimiser that saw zeros would drop biases, and one that saw twins would merge them."""
    inputs = example_inputs(fresh)["encode"]
    graph = build_graphs(fresh)["encode"]
    one = trace(graph, inputs)
    kept = {key: value.clone() for key, value in fresh.state_dict().items()}
    try:
        with torch.no_grad():
            for parameter in fresh.codec.parameters():
                parameter.zero_()
        two = trace(graph, inputs)
        proto = with_weights(two, graph)
    finally:
        fresh.load_state_dict(kept)
    assert one.model == two.model
    assert one.sources == two.sources
    held = [t.metadata_props[0].value for t in proto.graph.initializer if t.metadata_props]
    keys = [json.loads(value)[0] for value in held]
    assert len(keys) == len(set(keys))
    assert {key for key in kept if key.startswith("codec.encoder.")} <= set(keys)


class _Rearranged(nn.Module):
    """Everything that `fold` knows, between a weight and its use; and what it leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 40))
        self.table = nn.Parameter(torch.randn(9, 4))
        self.register_buffer("order", torch.tensor([4, 0, 0, 8]), persistent=False)
        self.register_buffer("many", torch.arange(1200) % 9, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.t()[3:9, 1:5] + self.table[2:4].reshape(8)[None, :4]
        y = y + self.table[self.order].sum(0) + self.table[self.many].mean(0)
        return y + self.weight[:1, -4:].unsqueeze(0)[0] * torch.exp(self.table[0])


def test_what_is_folded_computes_the_same() -> None:
    torch.manual_seed(1)
    module, x = _Rearranged().eval(), torch.randn(3, 6)
    graph = Graph(module, ("x",), ("y",))  # type: ignore[arg-type]
    proto = to_onnx(graph, {"x": x})
    entries = weight_map.build({"g": proto}, module)["graphs"]["g"]
    operations = {step[0] for entry in entries.values() for step in entry["transform"]}
    assert operations >= {"transpose", "slice", "reshape", "gather"}
    assert "table" in entries  # the long lookup and the exponential stay in the graph
    for _ in range(2):
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        with torch.no_grad():
            wanted = module(x)
            torch.testing.assert_close(
                torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), wanted
            )
            for parameter in module.parameters():
                parameter.mul_(0.5).add_(0.1)
        weight_map.apply(proto, entries, module.state_dict())


@pytest.mark.parametrize(
    ("operations", "wanted"),
    [
        ([["transpose", 2, 0, 1]], lambda x: x.permute(2, 0, 1)),
        ([["slice", 1, 1, 3], ["reshape", 8, 2]], lambda x: x[:, 1:3].reshape(8, 2)),
        ([["gather", 1, [[2, 0], [1, 1]]]], lambda x: x[:, torch.tensor([[2, 0], [1, 1]])]),
        ([["half"]], lambda x: x.half()),
    ],
)
def test_operations(operations: list[Any], wanted: Any) -> None:
    x = torch.randn(4, 3, 2)
    assert torch.equal(chain(x, operations), wanted(x))


def test_refusals(protos: Protos, stored: dict[str, Any], nano_model: HeartBeat) -> None:
    proto, entries = protos["encode"], stored["graphs"]["encode"]
    name, entry = next((n, e) for n, e in entries.items() if e["dtype"] == "float16")
    key, state = entry["tensor"], dict(nano_model.state_dict())
    cases: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
        (entries, {k: v for k, v in state.items() if k != key}, f"no tensor {key}"),
        (entries, {**state, key: state[key][:-1]}, "does not make"),
        (entries, {**state, key: state[key] * 1e9}, "exceeds float16"),
        ({"none.such": entry}, state, "no initializer none.such"),
        ({name: {**entry, "transform": [["eval", 1]]}}, state, "operation 'eval'"),
        ({name: {**entry, "transform": [["slice", 0, 0, 10**6]]}}, state, "does not make"),
    ]
    for map_, tensors, message in cases:
        with pytest.raises(ExportError, match=message):
            weight_map.apply(proto, map_, tensors)


def test_a_lost_source_is_refused(protos: Protos, nano_model: HeartBeat, fresh: HeartBeat) -> None:
    """Files of before, or of another exporter, and files of other weights."""
    with pytest.raises(ExportError, match=r"is not the model's"):
        weight_map.build({"encode": protos["encode"]}, fresh)
    for tensor in protos["encode"].graph.initializer:
        del tensor.metadata_props[:]
    with pytest.raises(ExportError, match=r"parameters are in no graph, the first codec.encoder"):
        weight_map.build(protos, nano_model)
