"""weights_map.json: which tensor of a checkpoint each initializer of a bundle holds, and other ones
put in their place, to the bit what a new export would hold.

Each weight carries its source in the file (TensorProto.metadata_props), from weight_sources.py;
the map is those of all graphs in one place, with digests of the constants that come from no weight.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from heartbeat_export.errors import ExportError
from heartbeat_export.weight_sources import Source, chain

SCHEMA_VERSION = 1
SOURCE = "heartbeat.source"  # the key in TensorProto.metadata_props
DTYPES = {
    "float32": (TensorProto.FLOAT, torch.float32),
    "float16": (TensorProto.FLOAT16, torch.float16),
    "bfloat16": (TensorProto.BFLOAT16, torch.bfloat16),
}


def build(protos: Mapping[str, onnx.ModelProto], model: nn.Module) -> dict[str, Any]:
    """The content of weights_map.json.

    Args:
        protos: the bundle's graphs by name, as to_onnx made them.
        model: the one they were made of.

    Returns:
        {"schema_version", "graphs": {GRAPH: {INITIALIZER: entry}}, "constants": {GRAPH:
        {INITIALIZER: SHA-256}}}. entry: "tensor" (state dict key), "transform" (for `chain`),
        "dtype", "shape".

    Raises:
        ExportError: a weight does not hold what its source says, or a parameter is in no graph: its
            source was lost, and new weights could not be put in.
    """
    state = model.state_dict()
    graphs: dict[str, dict[str, Any]] = {}
    constants: dict[str, dict[str, str]] = {}
    for name, proto in protos.items():
        graphs[name], constants[name] = {}, {}
        for tensor in proto.graph.initializer:
            source = _source(tensor)
            if source is None:
                constants[name][tensor.name] = _digest(tensor)
                continue
            graphs[name][tensor.name] = _entry(tensor, source)
            again = TensorProto()
            _put(again, graphs[name][tensor.name], state)
            if again.raw_data != tensor.raw_data:
                raise ExportError(f"graph {name}: {tensor.name} is not the model's {source[0]}")
    used = {entry["tensor"] for entries in graphs.values() for entry in entries.values()}
    if lost := [key for key, _ in model.named_parameters() if key not in used]:
        raise ExportError(
            f"weights map: {len(lost)} parameters are in no graph, the first {lost[0]}: "
            "the graphs are not this model's, or were not exported by this release"
        )
    return {"schema_version": SCHEMA_VERSION, "graphs": graphs, "constants": constants}


def apply(
    proto: onnx.ModelProto, entries: Mapping[str, Any], state_dict: Mapping[str, Tensor]
) -> None:
    """Puts other weights into a graph, in place: to the bit what a new export would hold.

    Args:
        entries: the graph's part of weights_map.json, graphs[GRAPH].
        state_dict: of a model of the same architecture; may be rounded already, or not.

    Raises:
        ExportError: an initializer or a tensor is missing or mis-shaped, or exceeds its dtype.
    """
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, entry in entries.items():
        if name not in tensors:
            raise ExportError(f"weights map: the graph has no initializer {name}: export it anew")
        _put(tensors[name], entry, state_dict)


def _put(tensor: TensorProto, entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """One initializer's new content."""
    key = entry["tensor"]
    if key not in state:
        raise ExportError(f"weights map: the checkpoint has no tensor {key}: export it anew")
    transform = tuple(tuple(operation) for operation in entry["transform"])
    fill(tensor, Source(key, transform, tuple(entry["shape"])), entry["dtype"], state[key])


def fill(tensor: TensorProto, source: Source, dtype: str, weight: Tensor) -> None:
    """Writes a weight into an initializer, with its source.

    Raises:
        ExportError: the weight has another shape than the graph's, or exceeds the dtype.
    """
    kind, torch_kind = DTYPES[dtype]
    try:
        value = chain(weight.detach().cpu(), source.transform).to(torch_kind).contiguous()
    except (RuntimeError, IndexError):  # a slice or a new shape that does not fit
        value = weight
    if tuple(value.shape) != source.shape or value.dtype != torch_kind:
        raise ExportError(
            f"weight {source.key}: {list(weight.shape)} does not make {list(source.shape)}: "
            "export the model anew"
        )
    if not bool(value.isfinite().all()) and bool(weight.isfinite().all()):
        raise ExportError(f"weight {source.key}: exceeds {dtype}: export at another precision")
    del tensor.dims[:], tensor.metadata_props[:]
    tensor.dims.extend(value.shape)
    tensor.data_type = kind
    tensor.raw_data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    entry = tensor.metadata_props.add()
    entry.key, entry.value = SOURCE, json.dumps([source.key, source.transform])


def _source(tensor: TensorProto) -> tuple[str, Any] | None:
    """What `fill` noted; None for a constant."""
    for entry in tensor.metadata_props:
        if entry.key == SOURCE:
            key, transform = json.loads(entry.value)
            return key, transform
    return None


def _entry(tensor: TensorProto, source: tuple[str, Any]) -> dict[str, Any]:
    dtype = next(name for name, (kind, _) in DTYPES.items() if kind == tensor.data_type)
    return {
        "tensor": source[0],
        "transform": source[1],
        "dtype": dtype,
        "shape": list(tensor.dims),
    }


def _digest(tensor: TensorProto) -> str:
    """SHA-256 of a constant's dtype, shape and values."""
    array = numpy_helper.to_array(tensor)
    head = f"{tensor.data_type}|{array.shape}|".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
