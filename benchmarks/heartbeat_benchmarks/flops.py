"""Floating-point operations of a graph, read off its ONNX file: two per multiplication and addition
of every convolution and matrix product. Nothing else counts: norms and activations are a few per
cent, and no peak is stated in them.
"""

from math import prod
from typing import Any

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.errors import MissingDependency, optional

Shapes = dict[str, tuple[int, ...]]


def bundle_flop(bundle: Bundle) -> dict[str, int]:
    """FLOP of one run of every graph, by name; empty where the onnx library is not installed.

    Raises:
        BundleError: a graph's file is not what the manifest says.
    """
    try:
        onnx = optional("onnx", "export")
    except MissingDependency:
        return {}
    graphs = bundle.manifest.graphs.items()
    return {name: count(onnx.load_from_string(bundle.read(spec))) for name, spec in graphs}


def clip_flop(graphs: dict[str, int], present: tuple[str, ...], steps: int, guidance: float) -> int:
    """FLOP of one clip as the generator runs it: encoders of absent conditions rest, guidance
    doubles the loop; the null context, encoded once a session, does not count."""
    parts = ["text", "context", "decode"]
    parts += ["image"] if "image" in present else []
    parts += ["local"] if {"sketch", "mask", "skeleton", "flow"} & set(present) else []
    loop = steps * (1 if guidance == 1 else 2) * graphs["denoise"]
    return sum(graphs[part] for part in parts) + loop


def count(model: Any) -> int:
    """FLOP of an onnx.ModelProto with static shapes."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    graph = inferred.graph
    shapes: Shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return sum(_node(node, shapes) for node in graph.node)


def _node(node: Any, shapes: Shapes) -> int:
    """FLOP of one node; 0 for what is neither a convolution nor a matrix product."""
    known = [shapes.get(name, ()) for name in node.input]
    out = shapes.get(node.output[0], ())
    if node.op_type == "Conv":  # weight (O, I/groups, k…)
        return 2 * prod(out) * prod(known[1][1:])
    if node.op_type == "ConvTranspose":  # weight (I, O/groups, k…)
        return 2 * prod(known[0]) * prod(known[1][1:])
    if node.op_type == "MatMul":
        return 2 * prod(out) * known[0][-1]
    if node.op_type == "Gemm":
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        return 2 * prod(out) * known[0][0 if turned else -1]
    if node.op_type == "Attention" and len(known[0]) == 4:  # q (B,H,L,D), k (B,H,S,D)
        return 4 * prod(known[0]) * known[1][2]
    return 0
