"""What a bundle is, in hashes: its architecture without weights, its weights without files or
dates, and what decides the bytes of an engine built of it.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from heartbeat_export.errors import ExportError
from heartbeat_export.weight_map import finite
from heartbeat_fast.bundle import Manifest
from heartbeat_fast.engines.base import Engine
from heartbeat_fast.engines.machine import threads
from heartbeat_fast.models.config import HeartBeatConfig, to_dict
from heartbeat_fast.models.graphs import HALF_FROM
from heartbeat_fast.models.heartbeat import HeartBeat

INTEGERS = (onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL)


def arch(graphs: Mapping[str, onnx.ModelProto]) -> str:
    """SHA-256 of the graphs without their weights: operators, attributes, wiring, shapes, dtypes.

    Names are replaced by order of appearance, since exporters number them anew. Integer constants
    are kept: they are shapes and axes, not weights.
    """
    return arch_of({name: normalised(graph) for name, graph in graphs.items()})


def arch_of(normal: Mapping[str, Any]) -> str:
    """As arch, of graphs that were `normalised` one after another, to hold one at a time."""
    text = json.dumps(normal, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(tensors: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """BLAKE2b of every tensor by name, over name, dtype, shape and bytes."""
    return {name: leaf(name, tensors[name]) for name in sorted(tensors)}


def leaf(name: str, tensor: NDArray[Any]) -> str:
    """BLAKE2b of one tensor, as `leaves`."""
    array = np.ascontiguousarray(tensor)
    digest = hashlib.blake2b(f"{name}|{array.dtype.str}|{array.shape}|".encode(), digest_size=32)
    digest.update(array.data if array.size else b"")
    return digest.hexdigest()


def of_model(model: HeartBeat) -> str:
    """`weights` of a model as graphs.round_to_half leaves it, without rounding it: a tensor at a
    time, on all processors.

    Raises:
        ExportError: a weight exceeds half precision.
    """
    large = {k for k, parameter in model.named_parameters() if parameter.numel() >= HALF_FROM}
    state = model.state_dict()

    def hashed(name: str) -> str:
        tensor = state[name].detach().cpu()
        if name in large:
            if not finite(half := tensor.half()):
                raise ExportError(f"weight {name}: exceeds half precision's 65504")
            tensor = half.to(tensor.dtype)
        return leaf(name, tensor.numpy())

    with ThreadPoolExecutor(threads()) as pool:
        return merkle_root(list(pool.map(hashed, sorted(state))))


def merkle_root(hashes: list[str]) -> str:
    """Root of a binary Merkle tree over hashes in order; an odd one rises as it is."""
    level = [bytes.fromhex(h) for h in hashes] or [b""]
    while len(level) > 1:
        pairs = [
            hashlib.blake2b(b"".join(level[i : i + 2]), digest_size=32).digest()
            for i in range(0, len(level) - 1, 2)
        ]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
    return level[0].hex()


def weights(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Merkle root over the tensors by name, e.g. of a state dict."""
    return merkle_root(list(leaves(tensors).values()))


def configuration(config: HeartBeatConfig) -> bytes:
    """config.json of a bundle: what its model is made of, for `rebuild` to compare by name."""
    return json.dumps(to_dict(config), indent=1, sort_keys=True).encode()


def build(manifest: Manifest, engine: Engine, driver: str = "") -> str:
    """SHA-256 of what decides the bytes of a compiled engine, but for its weights.

    Args:
        manifest: gives architecture, shapes, precision and opset.
        engine: gives its name, precision, device, and by `available` its version.
        driver: of the device, where there is one.
    """
    shapes = {
        name: [[t.name, t.dtype, list(t.shape)] for t in (*graph.inputs, *graph.outputs)]
        for name, graph in manifest.graphs.items()
    }
    facts = {
        "arch": manifest.fingerprints.get("arch", ""),
        "shapes": shapes,
        "recipe": {key: getattr(manifest, key, None) for key in ("precision", "opset", "flavour")},
        "engine": [engine.name, engine.precision, engine.available()[1]],
        "device": [engine.device, platform.machine(), driver],
    }
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def normalised(model: onnx.ModelProto) -> dict[str, Any]:
    """A graph as JSON values, without weights and names."""
    number: dict[str, int] = {}

    def ids(names: Any) -> list[int]:
        return [number.setdefault(name, len(number)) if name else -1 for name in names]

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    return {
        "opsets": sorted((entry.domain, entry.version) for entry in model.opset_import),
        "inputs": [(ids([v.name]), str(v.type)) for v in graph.input],
        "nodes": [
            {
                "op": f"{node.domain}:{node.op_type}",
                "attributes": {a.name: _attribute(a) for a in node.attribute},
                "inputs": ids(node.input),
                "constants": [_constant(constants[n]) for n in node.input if n in constants],
                "outputs": ids(node.output),
            }
            for node in graph.node
        ],
        "outputs": [(ids([v.name]), str(v.type)) for v in graph.output],
    }


def _constant(tensor: onnx.TensorProto) -> list[Any]:
    values = numpy_helper.to_array(tensor).tolist() if tensor.data_type in INTEGERS else None
    return [tensor.data_type, list(tensor.dims), values]


def _attribute(attribute: onnx.AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return _constant(value)
    return repr(value) if isinstance(value, (bytes, onnx.GraphProto)) else str(value)
