"""Precision written into a graph: casts between its nodes, so that every engine computes the same.

Strongly typed engines (TensorRT 11 has no other kind) take a tensor's type from the file alone. At
"fp16" and "bf16" products, convolutions and what lies between them are in that type. In float32
stay the statistics of norms (stash_type, ONNX's default of 1 for GroupNormalization and
LayerNormalization), the softmax (softmax_precision in Attention), sums over an axis, logarithms,
powers, sines and cosines, and the graph's own inputs and outputs: hosts never see a low type.

A lone operation between two such stays in float32, an addition of a low and a float32 tensor is
low: the residual stream of a network that starts with a convolution is low throughout.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
LOW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # a weight's, as numpy names it
SUFFIX = {"fp16": "half", "bf16": "bfloat16"}

PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Attention"}
FULL = {
    *("Softmax", "BatchNormalization", "ReduceSum", "ReduceMean", "IsNaN", "Cast"),
    *("Log", "Exp", "Pow", "Sqrt", "Reciprocal", "Sin", "Cos", "Greater", "Less", "Equal"),
}
FULL_AT_BF16 = {"Resize"}  # TensorRT has none in bfloat16
# Inputs whose type is fixed to float32 by ONNX: roi and scales.
FIXED = {"Resize": (1, 2)}


@dataclass
class _Rewriter:
    """One graph on its way to a low type.

    types: element type of every value as it now is. low, full: what a value is called in the low
    type and in float32. weights: names of weights without a value yet. wanted: (weight, precision)
    to the initializer's name.
    """

    graph: onnx.GraphProto
    precision: str
    weights: set[str]
    types: dict[str, int]
    constants: dict[str, TensorProto]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    names: dict[tuple[str, bool], str] = field(default_factory=dict)
    wanted: dict[tuple[str, str], str] = field(default_factory=dict)

    def low(self, name: str) -> bool:
        """Whether a value that the graph computes is in the low type."""
        return self.types.get(name) == LOW[self.precision]

    def floating(self, name: str) -> bool:
        """Whether a value is of a type that precision is about."""
        return self.types.get(name) in (TensorProto.FLOAT, LOW[self.precision])

    def fixed(self, name: str) -> bool:
        """Whether a value is a weight or a constant."""
        return name in self.weights or name in self.constants

    def visit(self, node: onnx.NodeProto) -> None:
        """Adds a node in the type that suits it, with casts of its inputs before it."""
        low = self.suits_low(node)
        fixed = FIXED.get(node.op_type, ())
        for i, name in enumerate(node.input):
            if self.floating(name):
                node.input[i] = self.as_type(name, low and i not in fixed)
        self.nodes.append(node)
        if low:
            if node.op_type == "Attention":
                node.attribute.append(helper.make_attribute("softmax_precision", TensorProto.FLOAT))
            for name in node.output:
                if self.types.get(name) == TensorProto.FLOAT:
                    self.types[name] = LOW[self.precision]

    def suits_low(self, node: onnx.NodeProto) -> bool:
        """Whether a node computes in the low type."""
        floats = [name for name in node.input if self.floating(name)]
        if not floats or node.op_type in FULL:
            return False
        if self.precision == "bf16" and node.op_type in FULL_AT_BF16:
            return False
        if node.op_type in PRODUCTS or node.domain == "hb":
            return True
        computed = [name for name in floats if not self.fixed(name)]
        return any(self.low(name) for name in computed) or not computed

    def as_type(self, name: str, low: bool) -> str:
        """A value's name in the low type or in float32; casts it where it has none yet."""
        if name in self.weights:
            precision = self.precision if low else "fp32"
            return self.wanted.setdefault((name, precision), weight_name(name, precision))
        if self.low(name) == low:
            return name
        if (name, low) not in self.names:
            other = f"{name}.{SUFFIX[self.precision] if low else 'float'}"
            self.names[name, low] = other
            if name in self.constants:
                tensor = _constant(self.constants[name], other, LOW[self.precision])
                self.graph.initializer.append(tensor)
            else:
                kind = LOW[self.precision] if low else TensorProto.FLOAT
                self.nodes.append(
                    helper.make_node("Cast", [name], [other], f"{other}.cast", to=kind)
                )
        return self.names[name, low]


def lower(
    model: onnx.ModelProto, weights: set[str], precision: Precision
) -> dict[tuple[str, str], str]:
    """Rewrites a graph in place to compute at a precision; inputs and outputs stay as they are.

    Args:
        weights: names of values that are weights, which nothing in the graph defines yet.

    Returns:
        Which weights the graph now wants: (weight, precision it is wanted in) → initializer name.
    """
    if precision == "fp32":
        return {(name, "fp32"): name for name in sorted(weights)}
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {name: tensor.data_type for name, tensor in constants.items()}
    types |= dict.fromkeys(weights, TensorProto.FLOAT)
    rewriter = _Rewriter(graph, precision, weights, types, constants)
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        rewriter.visit(node)
    _restore_outputs(rewriter, outputs)
    del graph.node[:]
    graph.node.extend(rewriter.nodes)
    for value in graph.value_info:
        value.type.tensor_type.elem_type = types[value.name]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return rewriter.wanted


def weight_name(name: str, precision: str) -> str:
    """What a weight is called at a precision; in float32 it keeps its name."""
    return name if precision == "fp32" else f"{name}.{SUFFIX[precision]}"


def _restore_outputs(rewriter: _Rewriter, outputs: set[str]) -> None:
    """Outputs that became low are cast back to float32 under their own names."""
    renamed = {name: f"{name}.{SUFFIX[rewriter.precision]}.out" for name in outputs}
    renamed = {name: new for name, new in renamed.items() if rewriter.low(name)}
    for node in rewriter.nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = renamed.get(name, name)
    for name, low in sorted(renamed.items()):
        shape = next(v.type.tensor_type.shape for v in rewriter.graph.output if v.name == name)
        value = helper.make_tensor_value_info(low, LOW[rewriter.precision], ())
        value.type.tensor_type.shape.CopyFrom(shape)
        rewriter.graph.value_info.append(value)
        rewriter.types[low] = LOW[rewriter.precision]
        rewriter.nodes.append(
            helper.make_node("Cast", [low], [name], f"{name}.cast", to=TensorProto.FLOAT)
        )


def _constant(tensor: TensorProto, name: str, kind: int) -> TensorProto:
    """A float32 constant in a low type. What exceeds its range becomes its end: an attention mask's
    −3.4e38 must not turn into an infinity, of which a row of softmax makes NaN."""
    array: NDArray[np.float32] = numpy_helper.to_array(tensor)
    dtype = torch.float16 if kind == TensorProto.FLOAT16 else torch.bfloat16
    limits = torch.finfo(dtype)
    bounded = np.where(np.isinf(array), array, np.clip(array, limits.min, limits.max))
    low = torch.from_numpy(np.array(bounded, np.float32)).to(dtype)
    raw = low.reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorProto(name=name, data_type=kind, dims=tensor.dims, raw_data=raw)
