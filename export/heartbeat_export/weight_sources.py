"""Where the weights of an exported graph come from: by construction, never guessed from content.

Before the exporter optimises a graph, its weights are taken away and stand as inputs (`detach`). So
no pass can see a value, and none can fold a weight into an anonymous constant, drop a bias that is
still zero, or merge two layers that start alike: the graph is the same whatever the weights are.
What the exporter left between a weight and its use (transposes, slices, lookups) is then folded and
written down (`fold`) as operations that `chain` repeats on any other weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from heartbeat_export.errors import ExportError
from heartbeat_fast.models.graphs import HALF_FROM

PREFIX = "model."  # graphs.Part holds the model under this name
MAX_LOOKUP = 1024  # indices written down; longer lookups stay in the graph
Operation = tuple[Any, ...]


@dataclass(frozen=True)
class Source:
    """Where a weight of a graph comes from: its key in the state dict, and what is done to it."""

    key: str
    transform: tuple[Operation, ...]
    shape: tuple[int, ...]

    @property
    def rounded(self) -> bool:
        """Whether it goes through half."""
        return self.transform[:1] == (("half",),)

    def then(self, operation: Operation) -> "Source":
        """The source of what one more operation makes of it."""
        meta = chain(torch.empty(self.shape, device="meta"), (operation,))
        return Source(self.key, (*self.transform, operation), tuple(meta.shape))


def chain(tensor: Tensor, transform: Any) -> Tensor:
    """A checkpoint's tensor through its operations, one after the other.

    half: rounding to it. transpose: the axes' new order. reshape: the new shape. slice: axis,
    start, end. gather: axis, then indices of any depth.

    Raises:
        ExportError: no such operation.
    """
    for name, *arguments in transform:
        if name == "half":
            tensor = tensor.half()
        elif name == "transpose":
            tensor = tensor.permute(arguments)
        elif name == "reshape":
            tensor = tensor.reshape(arguments)
        elif name == "slice":
            axis, start, end = arguments
            tensor = tensor.narrow(axis, start, end - start)
        elif name == "gather":
            axis, ids = arguments[0], torch.tensor(arguments[1], device=tensor.device)
            found = tensor.index_select(axis, ids.flatten())
            tensor = found.reshape(*tensor.shape[:axis], *ids.shape, *tensor.shape[axis + 1 :])
        else:
            raise ExportError(f"weights map: operation {name!r} is none that this release knows")
    return tensor


def detach(model: Any, keys: Mapping[str, Any]) -> dict[str, Source]:
    """Turns the weights of an exporter's graph (onnx_ir.Model) into inputs; returns their sources.

    Args:
        keys: the state dict; what it does not hold (a mask, a table of positions) stays a constant.
    """
    graph, sources = model.graph, {}
    for name in list(graph.initializers):
        if (key := name.removeprefix(PREFIX)) in keys:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
            sources[name] = Source(key, (), tuple(keys[key].shape))
    return sources


def fold(graph: onnx.GraphProto, weights: Mapping[str, Source]) -> dict[str, Source]:
    """Folds what only rearranges a weight into its source; weights are no inputs afterwards.

    Returns the sources of the weights that the graph then uses, named by key and operations.
    """
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer if _short(t)}
    sources, kept = dict(weights), []
    for node in graph.node:
        source = sources.get(node.input[0]) if node.input else None
        operations = None if source is None else _operations(node, source, constants)
        if source is None or operations is None:
            kept.append(node)
            continue
        for operation in operations:
            source = source.then(operation)
        sources[node.output[0]] = source
    names: dict[str, str] = {}
    for node in kept:
        for i, value in enumerate(node.input):
            if value in sources:
                if value not in names:
                    names[value] = _name(sources[value], set(names.values()))
                node.input[i] = names[value]
    inputs = [value for value in graph.input if value.name not in weights]
    used = {value for node in kept for value in node.input}
    rest = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, values in ((graph.node, kept), (graph.input, inputs), (graph.initializer, rest)):
        del field[:]
        field.extend(values)
    return {names[old]: source for old, source in sources.items() if old in names}


def rounded(source: Source, parameters: Mapping[str, nn.Parameter]) -> Source:
    """The source as a bundle holds it: large parameters in half first (graphs.round_to_half)."""
    large = source.key in parameters and parameters[source.key].numel() >= HALF_FROM
    return Source(source.key, (("half",), *source.transform), source.shape) if large else source


def _short(tensor: TensorProto) -> bool:
    """Whether a tensor is of integers and short enough to be an operation's argument."""
    return tensor.data_type == TensorProto.INT64 and np.prod(tensor.dims) <= MAX_LOOKUP


# What a node does


def _operations(
    node: onnx.NodeProto, source: Source, constants: Mapping[str, NDArray[Any]]
) -> list[Operation] | None:
    """What a node does to a weight that comes into it; None: it computes, or is too long."""
    if any(name not in constants for name in node.input[1:]):
        return None
    given = [constants[name] for name in node.input[1:]]
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    rank = len(source.shape)
    match node.op_type:
        case "Identity":
            return []
        case "Transpose":
            return [("transpose", *attributes.get("perm", reversed(range(rank))))]
        case "Reshape" if not (given[0] == 0).any():
            return [("reshape", *given[0].tolist())]
        case "Unsqueeze":
            shape, ends = list(source.shape), rank + given[0].size
            for axis in sorted(int(a) % ends for a in given[0]):
                shape.insert(axis, 1)
            return [("reshape", *shape)]
        case "Slice" if len(given) < 4 or (given[3] == 1).all():
            axes = given[2].tolist() if len(given) > 2 else list(range(given[0].size))
            spans = [slice(int(a), int(b)) for a, b in zip(given[0], given[1], strict=True)]
            sizes = [source.shape[axis] for axis in axes]
            return [
                ("slice", axis % rank, *span.indices(size)[:2])
                for axis, span, size in zip(axes, spans, sizes, strict=True)
            ]
        case "Gather":
            return _lookup(attributes.get("axis", 0) % rank, given[0], source.shape)
        case "GatherND" if given[0].shape[-1:] == (1,) and not attributes.get("batch_dims"):
            return _lookup(0, given[0][..., 0], source.shape)
    return None


def _lookup(axis: int, ids: NDArray[np.int64], shape: tuple[int, ...]) -> list[Operation]:
    """Gather's operations: a slice where the indices are consecutive (a table's first rows)."""
    ids = ids % shape[axis]
    flat = ids.flatten()
    if flat.size == 0 or (flat != np.arange(flat.size) + flat[0]).any():
        return [("gather", axis, ids.tolist())]
    start = int(flat[0])
    whole = start == 0 and flat.size == shape[axis]
    cut = [] if whole else [("slice", axis, start, start + flat.size)]
    if ids.ndim == 1:
        return list(cut)
    return [*cut, ("reshape", *shape[:axis], *ids.shape, *shape[axis + 1 :])]


def _name(source: Source, taken: set[str]) -> str:
    """A readable name: the key, and the operations if there are any."""
    name = base = ".".join([source.key, *(operation[0] for operation in source.transform)])
    count = 1
    while name in taken:
        name, count = f"{base}.{count}", count + 1
    return name
