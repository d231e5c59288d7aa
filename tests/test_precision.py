"""fp16, bf16, opset 23 and the plugin flavour: what the files say, and what they compute."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from heartbeat_export import to_onnx, weight_map
from heartbeat_export.cli import main
from heartbeat_export.errors import ExportError
from heartbeat_export.parity import bounds, relative_error
from heartbeat_export.precision import FULL, PRODUCTS
from heartbeat_export.rounding import rounding
from heartbeat_export.to_onnx import Traced, signature, trace, with_weights
from heartbeat_fast.bundle import GRAPHS, Bundle
from heartbeat_fast.errors import BundleError
from heartbeat_fast.models.config import NANO
from heartbeat_fast.models.graphs import build_graphs, example_inputs, round_to_half
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer
from heartbeat_kernels import reference

LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
Arrays = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def inputs(nano_model: HeartBeat) -> dict[str, Arrays]:
    examples = example_inputs(nano_model)
    return {name: {k: v.numpy() for k, v in values.items()} for name, values in examples.items()}


@pytest.fixture(scope="module")
def traced(nano_model: HeartBeat) -> dict[str, Traced]:
    """Every graph at opset 23, once: precisions start from there."""
    examples = example_inputs(nano_model)
    return {name: trace(g, examples[name], 23) for name, g in build_graphs(nano_model).items()}


@pytest.fixture(scope="module")
def plugin(nano_model: HeartBeat) -> Traced:
    """The one graph that has nodes of ours."""
    graph = build_graphs(nano_model)["denoise"]
    return trace(graph, example_inputs(nano_model)["denoise"], 21, "plugin")


def error(nano_model: HeartBeat, name: str, proto: onnx.ModelProto, inputs: Arrays) -> float:
    """The largest relative error of a graph's outputs in ONNX Runtime, against torch."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    graph = build_graphs(nano_model)[name]
    with torch.inference_mode():
        values = graph.module(*(torch.from_numpy(inputs[key]) for key in graph.inputs))
    wanted = values if isinstance(values, tuple) else (values,)
    came = session.run(list(graph.outputs), inputs)
    return max(relative_error(a, b.numpy()) for a, b in zip(came, wanted, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", GRAPHS)
def test_every_graph_at_every_precision(
    name: str,
    precision: Any,
    traced: dict[str, Traced],
    nano_model: HeartBeat,
    inputs: dict[str, Arrays],
) -> None:
    """ONNX Runtime runs fp32 and fp16 as they are; bf16, which it has not on a CPU, and fp16 again
    with every value rounded as the file says."""
    proto = with_weights(traced[name], build_graphs(nano_model)[name], precision)
    # ONNX's own rules hold for every node: types, and shapes as they were.
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    ends = signature([*proto.graph.input, *proto.graph.output])
    assert {tensor.dtype for tensor in ends} <= {"float32", "int64"}
    if precision != "bf16":
        assert error(nano_model, name, proto, inputs[name]) <= bounds(precision).error
    if precision != "fp32":
        rounded = error(nano_model, name, rounding(proto), inputs[name])
        # Below by a factor of three: the bounds leave room for deeper models. Above what fp32 has:
        # the precision is really lower.
        assert 1e-5 < rounded <= bounds(precision).error / 3


def test_an_image_encoder_as_base_has_it() -> None:
    """Windows, relative positions, a larger picture: none of them is in nano."""
    torch.manual_seed(0)
    image = replace(
        NANO.image,
        **{"size": 2 * NANO.size, "layers": 2, "window": 3, "global_layers": (1,)},
        relative_positions=True,
    )
    model = round_to_half(HeartBeat(replace(NANO, image=image)).eval())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rel_pos" in name:  # zero at first
                parameter.normal_(0, 0.1)
    example = {"image": torch.rand(1, 3, NANO.size, NANO.size), "present": torch.ones(1, 7)}
    graph = build_graphs(model)["image"]
    found = trace(graph, example)
    arrays = {key: value.numpy() for key, value in example.items()}
    assert error(model, "image", with_weights(found, graph), arrays) < 1e-5
    low = rounding(with_weights(found, graph, "fp16"))
    assert error(model, "image", low, arrays) <= bounds("fp16").error / 3
    assert len({source.key for source in found.sources.values() if "rel_pos" in source.key}) == 4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_products_are_low_and_statistics_are_not(
    precision: Any, traced: dict[str, Traced], nano_model: HeartBeat
) -> None:
    for name, graph in build_graphs(nano_model).items():
        proto = with_weights(traced[name], graph, precision)
        typed = onnx.shape_inference.infer_shapes(proto).graph
        types = {v.name: v.type.tensor_type.elem_type for v in (*typed.value_info, *typed.input)}
        types |= {t.name: t.data_type for t in typed.initializer}
        for node in typed.node:
            kinds = {types[i] for i in node.input if i} & {TensorProto.FLOAT, LOW[precision]}
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if node.op_type in PRODUCTS:
                assert kinds == {LOW[precision]}, node.name
            if node.op_type in FULL - {"Cast"}:
                assert LOW[precision] not in kinds, node.name
            if node.op_type in ("GroupNormalization", "LayerNormalization"):
                assert attributes.get("stash_type", 1) == TensorProto.FLOAT
            if node.op_type == "Attention":
                assert attributes["softmax_precision"] == TensorProto.FLOAT
            if node.op_type == "Resize" and precision == "bf16":
                assert kinds == {TensorProto.FLOAT}
        large = [t for t in proto.graph.initializer if t.metadata_props and np.prod(t.dims) >= 1024]
        assert {tensor.data_type for tensor in large} <= {LOW[precision]}, name
    denoise = traced["denoise"].model.graph.node
    assert {"Attention", "GroupNormalization", "Resize"} <= {node.op_type for node in denoise}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_map_holds_at_every_precision(
    precision: Any, traced: dict[str, Traced], nano_model: HeartBeat
) -> None:
    """Weights that were put in are those of an export; large ones go through half first."""
    graph = build_graphs(nano_model)["local"]
    proto = with_weights(traced["local"], graph, precision)
    before = proto.SerializeToString(deterministic=True)
    entries = {
        tensor.name: weight_map.entry(tensor)
        for tensor in proto.graph.initializer
        if tensor.metadata_props
    }
    assert {entry["dtype"] for entry in entries.values()} == {
        {"fp16": "float16", "bf16": "bfloat16"}[precision]
    }
    state = nano_model.state_dict()
    other = {k: v * 1.5 for k, v in state.items()}
    weight_map.apply(proto, entries, other)
    assert proto.SerializeToString(deterministic=True) != before
    weight_map.apply(proto, entries, state)
    assert proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_rounding_is_that_of_the_type(name: str, dtype: torch.dtype) -> None:
    """To the bit, torch's casts; beyond 65504 fp16 is infinite here too."""
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=LOW[name]),
        helper.make_node("Cast", ["low"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4003]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    torch.manual_seed(0)
    x = torch.randn(4000) * 10 ** torch.empty(4000).uniform_(-3, 4)
    x = torch.where(x.abs() < 6.2e-5, x.sign(), x)  # subnormals of fp16 are not rounded
    x = torch.cat([x, torch.tensor([0.0, 65519.9, -7e4 if name == "fp16" else -7.0])])
    session = onnxruntime.InferenceSession(rounding(model).SerializeToString())
    came = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    assert torch.equal(came, x.to(dtype).float())
    assert bool(came.isinf().any()) == (name == "fp16")


class temporal_attention(OpRun):
    """hb's node for ONNX's own evaluator, by the kernels' reference."""

    op_domain = "hb"

    def _run(self, q, k, v, heads, aot, plugin_namespace):  # type: ignore[no-untyped-def]
        q, k, v = (torch.from_numpy(np.array(a)) for a in (q, k, v))
        return (reference.temporal_attention(q, k, v, heads).numpy(),)


class dual_cross_attention(OpRun):
    """The same for the other node."""

    op_domain = "hb"

    def _run(self, *arrays, heads, image_scale, aot, plugin_namespace):  # type: ignore[no-untyped-def]
        q, k, v, q2, k2, v2 = (torch.from_numpy(np.array(a)) for a in arrays)
        return (
            reference.dual_cross_attention((q, k, v), (q2, k2, v2), heads, image_scale).numpy(),
        )


def test_the_plugin_flavour_computes_the_same(
    plugin: Traced, nano_model: HeartBeat, inputs: dict[str, Arrays]
) -> None:
    graph = build_graphs(nano_model)["denoise"]
    proto = with_weights(plugin, graph)
    nodes = [node for node in proto.graph.node if node.domain == "hb"]
    transformers = len(list(nano_model.denoiser.transformers()))
    for kind in ("temporal_attention", "dual_cross_attention"):
        assert sum(node.op_type == kind for node in nodes) == transformers
    evaluator = ReferenceEvaluator(proto, new_ops=[temporal_attention, dual_cross_attention])
    came = evaluator.run(None, inputs["denoise"])[0]
    with torch.inference_mode():
        tensors = (torch.from_numpy(inputs["denoise"][key]) for key in graph.inputs)
        assert relative_error(came, graph.module(*tensors).numpy()) < 1e-5


@pytest.fixture
def cached(
    traced: dict[str, Traced], plugin: Traced, nano_model: HeartBeat, monkeypatch: Any
) -> None:
    """build_bundle without tracing: the other graphs have no node of ours in either flavour."""
    names = {graph.outputs: name for name, graph in build_graphs(nano_model).items()}

    def found(graph: Any, inputs: Any, opset: int, flavour: str) -> Traced:
        name = names[graph.outputs]
        return plugin if (name, flavour) == ("denoise", "plugin") else traced[name]

    monkeypatch.setattr(to_onnx, "trace", found)


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("options", "wanted", "engine"),
    [
        (["--precision", "bf16"], ("bf16", "standard", 23), "rounded to bf16"),
        (["--precision", "fp16", "--opset", "23"], ("fp16", "standard", 23), "rounded to fp16"),
        (["--flavour", "plugin"], ("fp32", "plugin", 21), "hb operations"),
    ],
)
def test_command(
    options: list[str],
    wanted: tuple[str, str, int],
    engine: str,
    nano_model: HeartBeat,
    nano_tokenizer: Tokenizer,
    tmp_path: Path,
) -> None:
    nano_model.save_pretrained(tmp_path / "model")
    nano_tokenizer.save(tmp_path / "model" / "tokenizer.json")
    out = tmp_path / "bundle"
    assert main(["onnx", str(tmp_path / "model"), "--out", str(out), *options]) == 0
    bundle = Bundle.open(out)
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.precision, manifest.flavour, manifest.opset) == wanted
    assert manifest.parity["engine"].endswith(engine)
    assert max(manifest.parity["relative_l2"].values()) <= bounds(manifest.precision).error
    assert manifest.parity["clip_psnr_db"] >= bounds(manifest.precision).decibels


def test_refusals(
    traced: dict[str, Traced],
    plugin: Traced,
    nano_model: HeartBeat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = build_graphs(nano_model)["denoise"]
    with pytest.raises(ExportError, match=r"from opset 22 on: choose 22 or 23"):
        with_weights(plugin, graph, "bf16")
    with pytest.raises(ExportError, match=r"opset 20, flavour standard came"):
        trace(graph, {}, 20)
    bias = nano_model.denoiser.conv_out.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias[0] = 1e5  # small weights are not rounded before, so this is the first to see it
        try:
            with pytest.raises(ExportError, match=r"denoiser.conv_out.bias: exceeds float16"):
                with_weights(traced["denoise"], graph, "fp16")
        finally:
            bias.copy_(kept)
    monkeypatch.setattr(to_onnx, "MAX_BYTES", 10**5)
    with pytest.raises(ExportError, match=r"graph out: its weights exceed 2 GiB"):
        with_weights(traced["denoise"], graph)


def test_manifests_without_the_fields_open(nano_bundle: Bundle, tmp_path: Path) -> None:
    """Bundles of before; and values that no release writes are refused."""
    shutil.copytree(nano_bundle.path, tmp_path / "b", symlinks=False)
    path = tmp_path / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in ("precision", "flavour", "opset"):
        del manifest[name]
    path.write_text(json.dumps(manifest))
    old = Bundle.open(tmp_path / "b").manifest
    assert (old.precision, old.flavour, old.opset) == ("fp32", "standard", 21)
    for name, value in [("precision", "fp8"), ("flavour", ""), ("opset", "21")]:
        path.write_text(json.dumps({**manifest, name: value}))
        with pytest.raises(BundleError, match=name):
            Bundle.open(tmp_path / "b")
