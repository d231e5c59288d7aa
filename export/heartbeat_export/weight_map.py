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
from heartbeat_export.onnx_bytes import Bytes, Span, same
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
    weight, value = _found(tensor.name, wanted, state)
    fill(tensor, weight, value)


def _found(
    name: str, wanted: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[Weight, Tensor]:
    """What an entry of the map says an initializer is, and the checkpoint's tensor for it."""
    key = wanted["tensor"]
    if key not in state:
        raise ExportError(f"weights map: the checkpoint has no tensor {key}: export it anew")
    transform = tuple(tuple(operation) for operation in wanted["transform"])
    return Weight(name, Source(key, transform, tuple(wanted["shape"])), wanted["dtype"]), state[key]


def difference(
    content: Bytes, span: Span, name: str, wanted: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Bytes | None:
    """What a checkpoint would put into an initializer, where that is not what it holds.

    Args:
        content: of the graph's file.  span: the initializer's.  wanted: its entry in the map.

    Raises:
        ExportError: as `apply`.
    """
    weight, value = _found(name, wanted, state)
    if DTYPES[weight.dtype][0] != span.dtype or weight.bytes != span.end - span.begin:
        raise ExportError(f"weights map: initializer {name} is not what it says: export it anew")
    put = _converted(weight, value)
    new: Bytes = put.reshape(-1).view(torch.uint8).numpy()
    if same(new, content[span.begin : span.end]):
        return None
    _check_range(weight, value, put)
    return new


def fill(tensor: TensorProto, weight: Weight, value: Tensor) -> None:
    """Writes a weight into an initializer, with its source.

    Args:
        value: the checkpoint's tensor.

    Raises:
        ExportError: the tensor has another shape than the graph's, or exceeds the dtype.
    """
    put = _converted(weight, value)
    _check_range(weight, value, put)
    del tensor.dims[:], tensor.metadata_props[:]
    tensor.dims.extend(put.shape)
    tensor.name, tensor.data_type = weight.name, DTYPES[weight.dtype][0]
    tensor.raw_data = put.reshape(-1).view(torch.uint8).numpy().tobytes()
    note = tensor.metadata_props.add()
    note.key, note.value = SOURCE, json.dumps([weight.source.key, weight.source.transform])


def _converted(weight: Weight, value: Tensor) -> Tensor:
    """A checkpoint's tensor as the graph holds it."""
    source = weight.source
    try:
        put = chain(value.detach().cpu(), source.transform).to(DTYPES[weight.dtype][1]).contiguous()
    except (RuntimeError, IndexError):  # a slice or a new shape that does not fit
        put = torch.empty(0)
    if tuple(put.shape) != source.shape:
        raise ExportError(
            f"weight {source.key}: {list(value.shape)} does not make {list(source.shape)}: "
            "export the model anew"
        )
    return put


def _check_range(weight: Weight, value: Tensor, put: Tensor) -> None:
    if not finite(put) and finite(value):
        raise ExportError(
            f"weight {weight.source.key}: exceeds {weight.dtype}: export at another precision"
        )


def finite(tensor: Tensor) -> bool:
    """Whether all numbers are: both ends are read, since isfinite makes a tensor for each step."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())


def _digest(tensor: TensorProto) -> str:
    """SHA-256 of a constant's dtype, shape and values."""
    array = numpy_helper.to_array(tensor)
    head = f"{tensor.data_type}|{array.shape}|".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()
