"""One graph to ONNX: torch.export, static shapes, precision and weights inside the file.

Opset 21 by default, not 23: 21 has GroupNormalization as one node and runs on every onnxruntime the
package allows (≥ 1.20). 23 adds the Attention node, which gained nothing there (tiny's denoise on
one core: 167.4 ms with 21, 168.3 ms with 23, onnxruntime 1.31); it is for engines that fuse it.
At fp32 large weights are stored in half, to which they were rounded; no file exceeds 2 GiB, and
none keeps weights outside itself.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from heartbeat_export import precision as precisions
from heartbeat_export import weight_map, weight_sources
from heartbeat_export.errors import ExportError as ExportError
from heartbeat_export.precision import Precision
from heartbeat_fast.bundle import DTYPES, MAX_BYTES, TensorSpec
from heartbeat_fast.models.blocks import use_kernels
from heartbeat_fast.models.graphs import HALF_FROM, Graph, Tensors
from heartbeat_kernels import to_onnx as hb

Flavour = Literal["standard", "plugin"]
OPSET = 21
OPSETS = (21, 22, 23)


@dataclass(frozen=True)
class Recipe:
    """What graphs are written as; `to_onnx` says what each means."""

    precision: Precision = "fp32"
    opset: int = OPSET
    flavour: Flavour = "standard"


PLAIN = Recipe()


@dataclass(frozen=True)
class Traced:
    """A graph without its weights, and where those come from; every precision starts here."""

    model: onnx.ModelProto
    sources: dict[str, weight_sources.Source]


def to_onnx(
    graph: Graph,
    inputs: Tensors,
    *,
    precision: Precision = "fp32",
    opset: int = OPSET,
    flavour: Flavour = "standard",
) -> onnx.ModelProto:
    """A graph as a checked ONNX model with its weights inside, each with its source noted.

    Args:
        inputs: example tensors by name; their shapes become the graph's.
        precision: what it computes in; inputs and outputs stay float32 and int64.
        opset: 21; 22, whose convolutions know bfloat16; or 23 with its Attention node.
        flavour: "standard", or "plugin" with nodes of the domain "hb", which need our plugins.

    Raises:
        ExportError: torch could not trace it, or the file would exceed 2 GiB.
    """
    return with_weights(trace(graph, inputs, opset, flavour), graph, precision)


def trace(
    graph: Graph, inputs: Tensors, opset: int = OPSET, flavour: Flavour = "standard"
) -> Traced:
    """The graph in float32, weights still missing: the same whatever they are.

    Raises:
        ExportError: no such opset or flavour, or torch could not trace it.
    """
    if opset not in OPSETS or flavour not in get_args(Flavour):
        raise ExportError(f"opset {opset}, flavour {flavour} came; wanted {OPSETS}, {Flavour}")
    model, plugin = _model(graph), flavour == "plugin"
    use_kernels(model, "triton" if plugin else "reference")
    try:
        # The plain attention lays its output out as written; a fused one's other strides would be
        # traced as views that the exported graph cannot take (SAM's relative positions).
        with _quiet(), sdpa_kernel(SDPBackend.MATH):
            program = torch.onnx.export(
                graph.module,
                tuple(inputs[name] for name in graph.inputs),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=opset,
                custom_translation_table=hb.translations() if plugin else None,
                dynamo=True,
                optimize=False,
            )
            assert program is not None
            sources = weight_sources.detach(program.model, model.state_dict())
            program.optimize()
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(f"{type(graph.module).__name__}: {error}") from error
    finally:
        use_kernels(model, "reference")
    proto: onnx.ModelProto = program.model_proto
    _tidy(proto)
    _drop_guards(proto.graph)
    sources = weight_sources.fold(proto.graph, sources)
    _restore_inputs(proto, graph, inputs)
    return Traced(proto, sources)


def with_weights(traced: Traced, graph: Graph, precision: Precision = "fp32") -> onnx.ModelProto:
    """A traced graph at a precision, with the weights of `graph`'s model.

    Raises:
        ExportError: a weight exceeds the precision, or the file would exceed 2 GiB.
    """
    model = onnx.ModelProto()
    model.CopyFrom(traced.model)
    if precision == "bf16" and model.opset_import[0].version < 22:
        raise ExportError("bf16: ONNX has bfloat16 convolutions from opset 22 on: choose 22 or 23")
    wanted = precisions.lower(model, set(traced.sources), precision)
    weights_to_half(model)
    part = _model(graph)
    parameters, state = dict(part.named_parameters()), part.state_dict()
    weights, casts = [], []
    for (name, at), initializer in wanted.items():
        source = weight_sources.rounded(traced.sources[name], parameters)
        dtype = precisions.DTYPE[at]
        if at == "fp32" and source.rounded and np.prod(source.shape) >= HALF_FROM:
            # Large ones in half, with a Cast to float32 that engines fold at load.
            low = f"{initializer}.half"
            casts.append(
                helper.make_node("Cast", [low], [initializer], f"{initializer}.cast", to=1)
            )
            dtype, initializer = "float16", low
        weights.append(weight_map.Weight(initializer, source, dtype))
    _prepend(model.graph, casts)
    if sum(weight.bytes for weight in weights) > MAX_BYTES:
        raise ExportError(
            f"graph {graph.outputs[0]}: its weights exceed 2 GiB, the most that one ONNX file "
            "holds, and bundles keep no weights outside: choose a smaller preset"
        )
    _check(model, weights)
    for weight in weights:
        weight_map.fill(model.graph.initializer.add(), weight, state[weight.source.key])
    return model


def _check(model: onnx.ModelProto, weights: list[weight_map.Weight]) -> None:
    """ONNX's checker on the graph with its weights as inputs: it copies what it checks, twice."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for weight in weights:
        kind, shape = weight_map.DTYPES[weight.dtype][0], weight.source.shape
        light.graph.input.append(helper.make_tensor_value_info(weight.name, kind, shape))
    onnx.checker.check_model(light)


def _model(graph: Graph) -> nn.Module:
    """What owns the graph's weights: the model that a Part holds, else the module itself."""
    model: nn.Module = getattr(graph.module, "model", graph.module)
    return model


def _tidy(model: onnx.ModelProto) -> None:
    """Removes torch's stack traces: half the file, and this machine's paths."""
    del model.metadata_props[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.metadata_props[:]
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]


def _drop_guards(graph: onnx.GraphProto) -> None:
    """Where(IsNaN(s), 0, s) after a softmax s becomes s: a guard against rows masked whole.

    No mask here hides a whole row (a causal one leaves the diagonal), and TensorRT-RTX 1.7 fails on
    the guard in half precision.
    """
    made = {name: node for node in graph.node for name in node.output}
    renamed: dict[str, str] = {}
    guards = []
    for node in graph.node:
        test = made.get(node.input[0]) if node.op_type == "Where" else None
        if test is None or test.op_type != "IsNaN" or test.input[0] != node.input[2]:
            continue
        if (source := made.get(node.input[2])) is not None and source.op_type == "Softmax":
            renamed[node.output[0]] = node.input[2]
            guards += [node, test]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    used = {name for node in graph.node if node not in guards for name in node.input}
    for node in guards:
        if node.op_type == "Where" or node.output[0] not in used:
            graph.node.remove(node)


def _prepend(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Nodes before all others."""
    nodes = [*nodes, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def weights_to_half(model: onnx.ModelProto) -> None:
    """Stores large float weights in half, with a Cast to float32 that engines fold at load.

    Only where that loses nothing: weights were rounded before (graphs.round_to_half), and constants
    that the exporter computed from them may not fit.
    """
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < HALF_FROM:
            continue
        full = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            half = full.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), full):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.half"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}.cast", to=1))
    _prepend(model.graph, casts)


def signature(values: list[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    """The manifest's view of a graph's inputs or outputs.

    Raises:
        ExportError: a shape is not static, or a type not one that bundles hold.
    """
    specs = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(d.dim_value for d in kind.shape.dim)
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
        if dtype not in DTYPES or 0 in shape:
            raise ExportError(f"{value.name}: {dtype} {shape}; wanted static {' or '.join(DTYPES)}")
        specs.append(TensorSpec(value.name, dtype, shape))
    return tuple(specs)


def _restore_inputs(model: onnx.ModelProto, graph: Graph, inputs: Tensors) -> None:
    """An input that a model does not use (a KL decoder's noise) is still part of the signature."""
    present = {value.name: value for value in model.graph.input}
    kinds = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}
    for name in graph.inputs:
        if name not in present:
            tensor = inputs[name]
            value = helper.make_tensor_value_info(name, kinds[tensor.dtype], list(tensor.shape))
            model.graph.input.append(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter prints progress to stdout and logs advice about files it does not write."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
