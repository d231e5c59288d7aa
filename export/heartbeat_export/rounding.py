"""A low-precision graph on a CPU: float32 throughout, every low value rounded as it is made.

What the parity gate runs for fp16 and bf16, because no CPU engine shows what the file says: ONNX
Runtime's has no bfloat16, and computes fp16 in float32 with casts between that it may leave out.
A strongly typed engine rounds wherever the file says so and adds up in float32; so does this.
Rounding to p bits is Veltkamp's splitting, c = x·(2^(24−p)+1), c − (c − x): four float operations
that no engine elides. Overflow to infinity is kept (fp16's 65504 is where it fails), subnormals are
not rounded.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from heartbeat_fast.bundle import Bundle, FileSpec, GraphSpec

BEYOND = 65520.0  # from here on fp16 rounds to infinity
# Element type: significant bits, largest value. 1e30, not bfloat16's 3.4e38: splitting must not
# overflow, and a masked score of −1e30 is as far below all others.
LOW = {TensorProto.FLOAT16: (11, 65504.0), TensorProto.BFLOAT16: (8, 1e30)}


class RoundedBundle(Bundle):
    """A bundle as an engine reads it, but every graph in float32 and rounding."""

    def read(self, spec: FileSpec) -> bytes:
        """A file's bytes; a graph's, rewritten.

        Raises:
            BundleError: the file is not what the manifest says.
        """
        content = super().read(spec)
        if not isinstance(spec, GraphSpec):
            return content
        return rounding(onnx.load_from_string(content)).SerializeToString()


def rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph in float32 that rounds where the given one is low; its low values keep their names.

    Args:
        model: with value_info for every value, as to_onnx writes it.
    """
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    nodes: list[onnx.NodeProto] = []
    kinds = set()
    for tensor in graph.initializer:
        if tensor.data_type in LOW:
            kinds.add(tensor.data_type)
            full = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(full, tensor.name))
    for node in graph.node:
        nodes.append(node)
        target = next((a.i for a in node.attribute if a.name == "to"), 0)
        for i, name in enumerate(node.output):
            kind = target if node.op_type == "Cast" else types.get(name, 0)
            if kind in LOW:
                kinds.add(kind)
                node.output[i] = f"{name}.exact"
                nodes += _round(node.output[i], name, kind)
        if target in LOW:
            attribute = next(a for a in node.attribute if a.name == "to")
            attribute.i = TensorProto.FLOAT
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    for kind in sorted(kinds):
        bits, most = LOW[kind]
        numbers = {"factor": 2.0 ** (24 - bits) + 1, "most": most, "least": -most, "beyond": BEYOND}
        for key, number in numbers.items():
            tensor = numpy_helper.from_array(np.array(number, np.float32), f"round.{kind}.{key}")
            graph.initializer.append(tensor)
    return model


def _round(x: str, y: str, kind: int) -> list[onnx.NodeProto]:
    """Nodes that make of x its rounding y."""
    factor, least, most = (f"round.{kind}.{key}" for key in ("factor", "least", "most"))
    steps = [
        ("Clip", [x, least, most], f"{y}.clip"),
        ("Mul", [f"{y}.clip", factor], f"{y}.c"),
        ("Sub", [f"{y}.c", f"{y}.clip"], f"{y}.d"),
    ]
    last = y
    if kind == TensorProto.FLOAT16:  # x/1 within the range, ±x/0 = ±∞ beyond it
        last = f"{y}.r"
        steps += [
            ("Abs", [x], f"{y}.a"),
            ("Less", [f"{y}.a", f"round.{kind}.beyond"], f"{y}.b"),
            ("Cast", [f"{y}.b"], f"{y}.one"),
        ]
    nodes = [helper.make_node(op, inputs, [out]) for op, inputs, out in steps]
    for node in nodes:
        if node.op_type == "Cast":
            node.attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    nodes.append(helper.make_node("Sub", [f"{y}.c", f"{y}.d"], [last]))
    if last != y:
        nodes.append(helper.make_node("Div", [last, f"{y}.one"], [y]))
    return nodes
