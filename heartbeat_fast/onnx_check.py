"""An ONNX file read as protobuf before any engine sees it, without the onnx library.

Engines parse with trust: external data may name any file, a node of a foreign domain may load a
library or an engine file, a loop need not end. This walk reads the file as they will and refuses
what our graphs never hold. Field numbers: onnx.proto, ONNX IR version 10. Weights are skipped, not
copied.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from heartbeat_fast.errors import HeartBeatError

if TYPE_CHECKING:
    from heartbeat_fast.bundle import TensorSpec

MAX_FIELDS = 500_000  # denoise of the base preset has less than a tenth of this
# "" and "ai.onnx" are the standard operators; "hb" are our own, which no engine loads by itself.
DOMAINS = (b"", b"ai.onnx", b"hb")
ELEMENTS = {1: "float32", 7: "int64"}


class OnnxError(HeartBeatError):
    """An ONNX file that is malformed or holds what a bundle's graph may not hold."""


class Value(NamedTuple):
    """An input or output as the file declares it; -1 stands for a dimension without a number."""

    name: str
    dtype: str
    shape: tuple[int, ...]


# Message → field → what the field is: another message, or what is wrong with its presence. All
# other fields are skipped. A message that stands twice is visited twice, as parsers merge them.
_MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 8: "Opset", 20: "!training code", 25: "!functions"},
    "Opset": {1: "domain"},
    "Graph": {1: "Node", 5: "Tensor", 11: "input", 12: "output", 15: "Sparse"},
    "Node": {5: "Attribute", 7: "domain"},
    "Attribute": {
        **{5: "Tensor", 10: "Tensor", 22: "Sparse", 23: "Sparse"},
        **{6: "!subgraphs", 11: "!subgraphs"},
    },
    "Sparse": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "!weights outside itself", 14: "location"},
}


def check(content: bytes) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """The declared inputs and outputs of a graph, after everything in the file has been seen.

    Raises:
        OnnxError: not a protobuf, external data, subgraphs, functions, or a foreign domain.
    """
    if content[4:8] == b"ORTM":  # one may be written to be both; onnxruntime would take it for this
        raise OnnxError("onnxruntime's own format, not ONNX: refused")
    view = memoryview(content)
    ends: dict[str, list[Value]] = {"input": [], "output": []}
    todo, graphs, fields = [("Model", 0, len(view))], 0, 0
    while todo:
        message, start, stop = todo.pop()
        for number, kind, value, begin, end in _fields(view, start, stop):
            if (fields := fields + 1) > MAX_FIELDS:
                raise OnnxError(f"more than {MAX_FIELDS} fields: no graph of ours")
            role = _MESSAGES[message].get(number, "")
            if role.startswith("!") or (role == "location" and value != 0):
                raise OnnxError(f"keeps {role.strip('!').replace('location', _OUTSIDE)}: refused")
            if not role or role == "location":
                continue
            if kind != 2:
                raise OnnxError(f"field {number} of {message} is no {role}: malformed")
            if role == "domain":
                if (domain := bytes(view[begin : min(end, begin + 64)])) not in DOMAINS:
                    raise OnnxError(f"asks for operators of {domain!r}: refused")
            elif role in ends:
                ends[role].append(_value(view, begin, end))
            else:
                graphs += role == "Graph"
                todo.append((role, begin, end))
    if graphs != 1:
        raise OnnxError(f"{graphs} graphs came; wanted one")
    return tuple(ends["input"]), tuple(ends["output"])


_OUTSIDE = "weights outside itself"


def hold(content: bytes, inputs: Iterable["TensorSpec"], outputs: Iterable["TensorSpec"]) -> None:
    """Checks a file and holds its inputs and outputs to what a manifest says of them.

    Raises:
        OnnxError: as `check`, or the file's signature is another one.
    """
    for side, said, found in zip(
        ("input", "output"), (inputs, outputs), check(content), strict=True
    ):
        if [tuple(value) for value in found] != [(t.name, t.dtype, t.shape) for t in said]:
            raise OnnxError(f"its {side}s are not what the manifest says: export the bundle again")


def _fields(view: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Field number, wire type, number (wire type 0), first and last byte of what it holds."""
    at = start
    while at < stop:
        tag, at = _varint(view, at, stop)
        number, kind = tag >> 3, tag & 7
        if not 0 < number < 2**29:
            raise OnnxError("a field without a number: no protobuf")
        value, begin = 0, at
        if kind == 0:
            value, at = _varint(view, at, stop)
        elif kind == 2:
            length, begin = _varint(view, at, stop)
            at = begin + length
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:  # 3 and 4 are groups, which ONNX never had
            raise OnnxError(f"wire type {kind}: no protobuf")
        if at > stop:
            raise OnnxError("truncated: a field is longer than what holds it")
        yield number, kind, value, begin, at


def _varint(view: memoryview, at: int, stop: int) -> tuple[int, int]:
    value = shift = 0
    while at < stop and shift < 70:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value & (2**64 - 1), at
    raise OnnxError("truncated: a number does not end")


def _value(view: memoryview, start: int, stop: int) -> Value:
    """A ValueInfoProto: name 1, type 2 → tensor_type 1 → elem_type 1, shape 2 → dim 1."""
    name, dtype, shape = "", "", []
    for number, kind, _, begin, end in _fields(view, start, stop):
        if number == 1 and kind == 2:
            name = bytes(view[begin : min(end, begin + 200)]).decode("utf-8", "replace")
        elif number == 2 and kind == 2:
            for inner, _, _, first, last in _fields(view, begin, end):
                if inner != 1:
                    continue
                for field, _, element, low, high in _fields(view, first, last):
                    if field == 1:
                        dtype = ELEMENTS.get(element, f"element type {element}")
                    elif field == 2:
                        shape += [_dimension(view, *dim[3:]) for dim in _fields(view, low, high)]
    return Value(name, dtype, tuple(shape))


def _dimension(view: memoryview, start: int, stop: int) -> int:
    """A Dimension: dim_value 1; dim_param 2 means that the shape is not static."""
    size = -1
    for number, kind, value, _, _ in _fields(view, start, stop):
        size = value if (number, kind) == (1, 0) else -1
    return size
