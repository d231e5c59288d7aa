"""A graph of static shapes made smaller: the same nodes and weights at a quarter of the work.

What the gate of a large bundle's new weights runs: a model call of `base` takes half a minute in
torch and again in ONNX Runtime. A graph knows its pictures' size in one kind of place only, the
targets of its Reshapes. Each axis is followed from the inputs as a list of factors, whole or of a
picture's side; a Reshape joins and cuts those lists, and its target is what they then multiply to.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper, numpy_helper

from heartbeat_export.errors import ExportError
from heartbeat_export.onnx_bytes import Bytes, outline, without_contents
from heartbeat_export.weight_map import SOURCE
from heartbeat_fast.bundle import TensorSpec
from heartbeat_fast.engines.base import Arrays
from heartbeat_fast.engines.machine import threads
from heartbeat_fast.errors import optional
from heartbeat_fast.onnx_check import ELEMENTS

BY = 2  # a side's divisor: the deepest level of `base` stays 2 wide, so a kernel's every tap counts
PICTURES = ("z", "noise", "local", "frames")  # inputs whose last two axes are a picture's sides


class Factor(NamedTuple):
    """A share of an axis: its length, and whether that goes with a picture's side."""

    length: int
    side: bool

    @property
    def smaller(self) -> int:
        """Its length in the smaller graph."""
        return self.length // BY if self.side else self.length


Axis = tuple[Factor, ...]


class SmallerGraph:
    """One graph in ONNX Runtime at a smaller size, its weights read where the file keeps them."""

    def __init__(self, content: Bytes) -> None:
        """Takes a graph's file, which passed heartbeat_fast.onnx_check.

        Raises:
            ExportError: the graph takes no picture, or a shape in it cannot be followed.
        """
        proto, spans = without_contents(content, _is_weight), outline(content).initializers
        weights = [t for t in proto.graph.initializer if _is_weight(t)]
        self.weights: Arrays = {}
        for tensor in weights:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            span = spans[tensor.name]
            values = np.frombuffer(content[span.begin : span.end].data, dtype)
            self.weights[tensor.name] = values.reshape(tuple(tensor.dims))
        resize(proto)
        declared = [
            helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in weights
        ]
        self.inputs = [
            TensorSpec(v.name, ELEMENTS[v.type.tensor_type.elem_type], _shape(v))
            for v in proto.graph.input
        ]
        # As inputs, weights are neither copied nor folded: no session of 7 GB.
        proto.graph.input.extend(declared)
        whole = [t for t in proto.graph.initializer if not _is_weight(t)]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(whole)
        ort = optional("onnxruntime", "cpu")
        options = ort.SessionOptions()
        options.log_severity_level, options.inter_op_num_threads = 3, 1
        options.intra_op_num_threads = threads()
        options.enable_mem_pattern = False
        providers = ["CPUExecutionProvider"]
        try:
            self._session = ort.InferenceSession(proto.SerializeToString(), options, providers)
        except Exception as error:  # onnxruntime's own classes, straight off Exception
            raise ExportError(f"a smaller graph does not load: {error}") from error
        self._names = [value.name for value in proto.graph.output]

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Its outputs; `graph` is its name and not looked at. A weight may be among the inputs.

        Raises:
            ExportError: onnxruntime cannot run it.
        """
        try:
            values = self._session.run(self._names, {**self.weights, **inputs})
        except Exception as error:  # as above
            raise ExportError(f"a smaller graph does not run: {error}") from error
        return dict(zip(self._names, values, strict=True))


def resize(proto: ModelProto) -> None:
    """Makes a graph smaller in place; weights may be without content.

    Raises:
        ExportError: it takes no picture, or a shape in it cannot be followed.
    """
    graph = proto.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer if not _is_weight(t)}
    lengths = {v.name: _shape(v) for v in (*graph.value_info, *graph.input, *graph.output)}
    lengths |= {t.name: tuple(t.dims) for t in graph.initializer}
    axes: dict[str, list[Axis]] = {name: _whole(shape) for name, shape in lengths.items()}
    pictures = [value for value in graph.input if value.name in PICTURES]
    if not pictures or any(side % BY for v in pictures for side in lengths[v.name][-2:]):
        raise ExportError("a graph without pictures, or of odd ones")
    for value in pictures:
        for i in (-2, -1):
            axes[value.name][i] = (Factor(lengths[value.name][i], True),)
    for number, node in enumerate(graph.node):
        output = node.output[0]
        if node.op_type == "Cast":  # those of weights have no shape noted
            lengths.setdefault(output, tuple(map(_length, axes[node.input[0]])))
        if output not in lengths:
            raise ExportError(f"{node.op_type} {output}: a value without a shape")
        axes[output] = _through(node, lengths[output], axes, constants)
        if node.op_type == "Reshape":
            target = np.array([_smaller(axis) for axis in axes[output]], np.int64)
            name = f"smaller.{number}"
            graph.initializer.append(numpy_helper.from_array(target, name))
            node.input[1] = name
    for value in (*graph.input, *graph.output):
        for i, axis in enumerate(axes[value.name]):
            value.type.tensor_type.shape.dim[i].dim_value = _smaller(axis)
    del graph.value_info[:]


def _through(
    node: NodeProto,
    lengths: tuple[int, ...],
    axes: dict[str, list[Axis]],
    constants: dict[str, NDArray[Any]],
) -> list[Axis]:
    """The axes of a node's output, `lengths` long at full size."""
    given = [axes[name] for name in node.input if name]
    match node.op_type:
        case "Reshape":
            return _cut([factor for axis in given[0] for factor in axis], lengths)
        case "Transpose":
            order = next(list(a.ints) for a in node.attribute if a.name == "perm")
            return [given[0][i] for i in order]
        case "MatMul":
            last = given[1][-1]
            return [*_aligned(given, lengths)[:-2], given[0][-2], last]
        case "Unsqueeze":
            found, new = iter(given[0]), {int(a) % len(lengths) for a in constants[node.input[1]]}
            return [(Factor(1, False),) if i in new else next(found) for i in range(len(lengths))]
        case "Conv" | "Resize":  # another side, but a side
            sides = [any(f.side for f in axis) for axis in given[0]]
            return [(Factor(n, s),) for n, s in zip(lengths, sides, strict=True)]
    return _aligned(given, lengths)


def _aligned(given: Sequence[list[Axis]], lengths: tuple[int, ...]) -> list[Axis]:
    """Axes that pass a node: each output's is that of the first input as long there, counted from
    the last as broadcasting does; a length of its own (a slice, a sum of two) is whole."""
    out: list[Axis] = []
    for back, length in enumerate(reversed(lengths), 1):
        here = [axes[-back] for axes in given if len(axes) >= back]
        out.append(next((a for a in here if _length(a) == length), (Factor(length, False),)))
    return out[::-1]


def _cut(factors: list[Factor], lengths: tuple[int, ...]) -> list[Axis]:
    """Factors, in order, dealt out to axes; one that is whole may be cut in two.

    Raises:
        ExportError: a picture's side would have to be cut.
    """
    left = [factor for factor in factors if factor.length > 1]
    out: list[Axis] = []
    for length in lengths:
        axis: list[Factor] = []
        while (wanted := length // math.prod(f.length for f in axis)) > 1:
            if not left:
                raise ExportError("a Reshape that cannot be followed")
            factor = left.pop(0)
            if wanted % factor.length:
                if factor.side or factor.length % wanted:
                    raise ExportError("a Reshape cuts a picture's side")
                left.insert(0, Factor(factor.length // wanted, False))
                factor = Factor(wanted, False)
            axis.append(factor)
        out.append(tuple(axis))
    return out


def _whole(shape: tuple[int, ...]) -> list[Axis]:
    return [(Factor(length, False),) for length in shape]


def _length(axis: Axis) -> int:
    return math.prod(factor.length for factor in axis)


def _smaller(axis: Axis) -> int:
    return math.prod(factor.smaller for factor in axis)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether a checkpoint's tensor is its source (weight_map.py)."""
    return any(item.key == SOURCE for item in tensor.metadata_props)
