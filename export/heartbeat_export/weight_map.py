"""weights_map.json: which tensor of a checkpoint each initializer of a bundle holds, and other ones
put in their place, to the bit what a new export would hold.

Each weight carries its source in the file (TensorProto.metadata_props), from weight_sources.py;
the map is those of all graphs in one place, with digests of the constants that come from no weight.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class GraphMap(NamedTuple):
    """One graph's part of the map: where its weights come from, digests of its constants."""

    entries: dict[str, Any]
    constants: dict[str, str]


@dataclass(frozen=True)
class Weight:
    """An initializer to be: its name, where its content comes from, numpy's name of its dtype."""

    name: str
    source: Source
    dtype: str

    @property
    def bytes(self) -> int:
        """How long its content is."""
        return math.prod(self.source.shape) * (4 if self.dtype == "float32" else 2)


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
    return whole({name: of_graph(name, proto, state) for name, proto in protos.items()}, model)


def of_graph(name: str, proto: onnx.ModelProto, state: Mapping[str, Tensor]) -> GraphMap:
    """One graph's part of the map, checked against the state dict that it was made of.

    Raises:
        ExportError: a weight does not hold what its source says.
    """
    entries: dict[str, Any] = {}
    constants: dict[str, str] = {}
    for tensor in proto.graph.initializer:
        if (found := entry(tensor)) is None:
            constants[tensor.name] = _digest(tensor)
            continue
        entries[tensor.name], again = found, TensorProto()
        _put(again, found, state)
        if again.raw_data != tensor.raw_data:
            raise ExportError(f"graph {name}: {tensor.name} is not the model's {found['tensor']}")
    return GraphMap(entries, constants)


def whole(parts: Mapping[str, GraphMap], model: nn.Module) -> dict[str, Any]:
    """The content of weights_map.json of all graphs' parts; errors as `build`."""
    graphs = {name: part.entries for name, part in parts.items()}
    constants = {name: part.constants for name, part in parts.items()}
    used = {found["tensor"] for entries in graphs.values() for found in entries.values()}
    if lost := [key for key, _ in model.named_parameters() if key not in used]:
        raise ExportError(
            f"weights map: {len(lost)} parameters are in no graph, the first {lost[0]}: "
            "the graphs are not this model's, or were not exported by this release"
        )
    return {"schema_version": SCHEMA_VERSION, "graphs": graphs, "constants": constants}


def entry(tensor: TensorProto) -> dict[str, Any] | None:
    """A weight's entry in the map, from what the file says of its source; None for a constant."""
    noted = next((item.value for item in tensor.metadata_props if item.key == SOURCE), None)
    if noted is None:
        return None
    key, transform = json.loads(noted)
    dtype = next(name for name, (kind, _) in DTYPES.items() if kind == tensor.data_type)
    return {"tensor": key, "transform": transform, "dtype": dtype, "shape": list(tensor.dims)}


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
    for name, wanted in entries.items():
        if name not in tensors:
            raise ExportError(f"weights map: the graph has no initializer {name}: export it anew")
        _put(tensors[name], wanted, state_dict)


def _put(tensor: TensorProto, wanted: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """One initializer's new content."""
    key = wanted["tensor"]
    if key not in state:
        raise ExportError(f"weights map: the checkpoint has no tensor {key}: export it anew")
    transform = tuple(tuple(operation) for operation in wanted["transform"])
    source = Source(key, transform, tuple(wanted["shape"]))
    fill(tensor, Weight(tensor.name, source, wanted["dtype"]), state[key])


def fill(tensor: TensorProto, weight: Weight, value: Tensor) -> None:
    """Writes a weight into an initializer, with its source.

    Args:
        value: the checkpoint's tensor.

    Raises:
        ExportError: the tensor has another shape than the graph's, or exceeds the dtype.
    """
    source, (kind, dtype) = weight.source, DTYPES[weight.dtype]
    try:
        put = chain(value.detach().cpu(), source.transform).to(dtype).contiguous()
    except (RuntimeError, IndexError):  # a slice or a new shape that does not fit
        put = torch.empty(0)
    if tuple(put.shape) != source.shape:
        raise ExportError(
            f"weight {source.key}: {list(value.shape)} does not make {list(source.shape)}: "
            "export the model anew"
        )
    if not bool(put.isfinite().all()) and bool(value.isfinite().all()):
        raise ExportError(
            f"weight {source.key}: exceeds {weight.dtype}: export at another precision"
        )
    del tensor.dims[:], tensor.metadata_props[:]
    tensor.dims.extend(put.shape)
    tensor.name, tensor.data_type = weight.name, kind
    tensor.raw_data = put.reshape(-1).view(torch.uint8).numpy().tobytes()
    note = tensor.metadata_props.add()
    note.key, note.value = SOURCE, json.dumps([source.key, source.transform])


def _digest(tensor: TensorProto) -> str:
    """SHA-256 of a constant's dtype, shape and values."""
    array = numpy_helper.to_array(tensor)
    head = f"{tensor.data_type}|{array.shape}|".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
