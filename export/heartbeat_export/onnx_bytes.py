"""An ONNX file as bytes: where each weight lies, and the file again with other ones in their place.

`base`'s denoiser is a file of 1.7 GB. Parsed and written by protobuf it is copied some eight times;
here it is mapped, read where it lies, and only what changed is held. Files come past
heartbeat_fast.onnx_check first, which has seen every field. Field numbers: onnx.proto, ONNX IR 10.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto

Bytes = NDArray[np.uint8]
GRAPH, NODE, TENSOR = 7, 1, 5  # of ModelProto and GraphProto
DTYPE, NAME, RAW = 2, 8, 9  # of TensorProto
QUANTISED = (b"QuantizeLinear", b"DequantizeLinear")
BLOCK = 2**20  # compared at once: it stays in the processor's cache


class Span(NamedTuple):
    """An initializer's content: first byte, byte behind the last, ONNX's element type."""

    begin: int
    end: int
    dtype: int


class Outline(NamedTuple):
    """Where a file keeps its initializers, and the names that quantised nodes take."""

    initializers: dict[str, Span]
    quantised: set[str]


def outline(content: Bytes) -> Outline:
    """Finds the initializers of a file; one that keeps no raw bytes has an empty span."""
    view = content.data
    found: dict[str, Span] = {}
    quantised: set[str] = set()
    for number, _, first, last in _in_graph(view):
        if number == TENSOR:
            name, span, _ = _initializer(view, first, last)
            found[name] = span
        elif number == NODE:
            node = bytes(view[first:last])
            if any(kind in node for kind in QUANTISED):
                quantised |= set(NodeProto.FromString(node).input)
    return Outline(found, quantised)


def without_contents(content: Bytes, empty: Callable[[TensorProto], bool]) -> ModelProto:
    """A file as onnx reads it, but of some initializers, told by all else of them, no content."""
    view = content.data
    model = ModelProto()
    for number, start, _, end in _fields(view, 0, len(view)):
        if number != GRAPH:
            model.MergeFromString(bytes(view[start:end]))
    for number, start, first, last in _in_graph(view):
        if number != TENSOR:
            model.graph.MergeFromString(bytes(view[start:last]))
            continue
        _, span, raw = _initializer(view, first, last)
        rest = bytes(view[first:raw]) + bytes(view[span.end : last])
        tensor = TensorProto.FromString(rest)
        if not empty(tensor):
            tensor = TensorProto.FromString(bytes(view[first:last]))
        model.graph.initializer.append(tensor)
    return model


def same(one: Bytes, other: Bytes) -> bool:
    """Whether two runs of bytes are equal, without a third of their length."""
    return one.size == other.size and all(
        np.array_equal(one[at : at + BLOCK], other[at : at + BLOCK])
        for at in range(0, one.size, BLOCK)
    )


def patched(content: Bytes, spans: Mapping[str, Span], new: Mapping[str, Bytes]) -> list[Bytes]:
    """A file's bytes in pieces, with other contents of some initializers; nothing is copied.

    Args:
        spans: of its initializers.  new: contents by initializer, each as long as the old one.
    """
    pieces, at = [], 0
    for name in sorted(new, key=lambda name: spans[name].begin):
        begin, end, _ = spans[name]
        assert end - begin == new[name].size  # weight_map.difference held it to that
        pieces += [content[at:begin], new[name]]
        at = end
    return [*pieces, content[at:]]


def _in_graph(view: memoryview) -> Iterator[tuple[int, int, int, int]]:
    """The fields of the file's graph."""
    for number, _, begin, end in _fields(view, 0, len(view)):
        if number == GRAPH:
            yield from _fields(view, begin, end)


def _initializer(view: memoryview, start: int, stop: int) -> tuple[str, Span, int]:
    """Name, span, and where the field of its content begins."""
    name, begin, end, dtype, raw = "", stop, stop, 0, stop
    for number, at, first, last in _fields(view, start, stop):
        if number == NAME:
            name = bytes(view[first:last]).decode()
        elif number == RAW:
            begin, end, raw = first, last, at
        elif number == DTYPE:
            dtype = _varint(view, first)[0]
    return name, Span(begin, end, dtype), raw


def _fields(view: memoryview, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Field number, where the field begins, what it holds (of a varint: its own bytes), its end."""
    at = start
    while at < stop:
        field = at
        tag, at = _varint(view, at)
        begin = at
        match tag & 7:
            case 0:
                _, at = _varint(view, at)
            case 2:
                length, begin = _varint(view, at)
                at = begin + length
            case kind:
                at += 8 if kind == 1 else 4
        yield tag >> 3, field, begin, at


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = view[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
