"""One graph to ONNX: torch.export, static shapes, weights in half inside the file.

Opset 21, not 23: 21 has GroupNormalization as one node and runs on every onnxruntime the package
allows (≥ 1.20). 23 adds the Attention node, which gained nothing there (tiny's denoise on one core:
167.4 ms with 21, 168.3 ms with 23, onnxruntime 1.31).
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from heartbeat_export import weight_map, weight_sources
from heartbeat_export.errors import ExportError as ExportError
from heartbeat_fast.bundle import DTYPES, TensorSpec
from heartbeat_fast.models.graphs import HALF_FROM, Graph, Tensors

OPSET = 21


def to_onnx(graph: Graph, inputs: Tensors) -> onnx.ModelProto:
    """A graph as a checked ONNX model with its weights inside, each with its source noted.

    Args:
        inputs: example tensors by name; their shapes become the graph's.

    Raises:
        ExportError: torch could not trace it.
    """
    with _quiet():
        try:
            program = torch.onnx.export(
                graph.module,
                tuple(inputs[name] for name in graph.inputs),
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{type(graph.module).__name__}: {error}") from error
        assert program is not None
        state = graph.module.model.state_dict()
        sources = weight_sources.detach(program.model, state)
        program.optimize()
    model: onnx.ModelProto = program.model_proto
    _tidy(model)
    sources = weight_sources.fold(model.graph, sources)
    _restore_inputs(model, graph, inputs)
    weights_to_half(model)
    _attach(model, graph, sources, state)
    onnx.checker.check_model(model)
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


def _attach(
    model: onnx.ModelProto, graph: Graph, sources: dict[str, weight_sources.Source], state: Tensors
) -> None:
    """The weights come back: large ones in half, with a Cast to float32 that engines fold."""
    parameters = dict(graph.module.model.named_parameters())
    casts = []
    for name, source in sources.items():
        source = weight_sources.rounded(source, parameters)
        tensor = model.graph.initializer.add(name=name)
        dtype = "float32"
        if source.rounded and np.prod(source.shape) >= HALF_FROM:
            dtype, tensor.name = "float16", f"{name}.half"
            casts.append(helper.make_node("Cast", [tensor.name], [name], f"{name}.cast", to=1))
        weight_map.fill(tensor, source, dtype, state[source.key])
    _prepend(model.graph, casts)


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
