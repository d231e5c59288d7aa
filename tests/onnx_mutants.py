"""ONNX files that reach out: external data in every spelling, subgraphs, functions, foreign code.

Written as protobuf by hand, since the onnx library would spell each of them in one way only.
"""

from pathlib import Path

import onnx
from onnx import helper

from heartbeat_fast.bundle import GRAPHS
from tests.bundle_mutants import Chance, pick, reseal, write

# Field numbers of onnx.proto.
GRAPH, OPSET, TRAINING, FUNCTIONS = 7, 8, 20, 25
NODE, INITIALIZER, SPARSE = 1, 5, 15


def varint(value: int, padding: int = 0) -> bytes:
    """A number; padding makes it longer than need be, which parsers accept."""
    out = []
    while value > 127 or padding > 0:
        out.append(value & 127 | 128)
        padding -= value <= 127
        value >>= 7
    return bytes([*out, value])


def field(number: int, content: bytes | int, padding: int = 0) -> bytes:
    """A field that holds a number, or a message, string or bytes."""
    if isinstance(content, int):
        return varint(number << 3, padding) + varint(content, padding)
    return varint(number << 3 | 2, padding) + varint(len(content), padding) + content


def external_tensor(chance: Chance) -> bytes:
    """A TensorProto whose numbers are in another file, spelt at random."""
    padding = int(chance.integers(4))
    key, value = field(1, b"location", padding), field(2, b"/etc/passwd", padding)
    odd = field(999, b"?" * int(chance.integers(9)), padding)  # unknown fields are skipped
    twice = field(1, b"other") + key  # the last one counts
    entry = pick(chance, [key + value, value + key, odd + key + odd + value, twice + value])
    data = field(13, entry, padding)
    if chance.integers(2):
        data += field(13, field(1, b"offset") + field(2, b"0"))
    location = field(14, pick(chance, [1, 2**64 - 1, 2]), padding)
    head = field(1, 16) + field(2, 1) + field(8, b"stolen")
    spellings = [data + location, location + data, location, odd + data, field(14, 0) + location]
    return head + pick(chance, spellings) + odd


def holder(chance: Chance) -> tuple[int, bytes]:
    """A field of GraphProto or (below 0) of ModelProto with such a tensor somewhere inside."""
    tensor = external_tensor(chance)
    sparse = field(pick(chance, [1, 2]), tensor) + field(3, 16)
    attribute = field(1, b"value") + pick(
        chance, [field(5, tensor), field(10, tensor), field(22, sparse), field(23, sparse)]
    )
    node = field(2, b"stolen") + field(4, b"Constant") + field(5, attribute)
    inner = field(INITIALIZER, tensor) + field(2, b"inner")
    branch = field(1, b"then_branch") + field(pick(chance, [6, 11]), inner)
    choice = field(4, b"If") + field(5, branch)
    function = field(1, b"f") + pick(chance, [field(7, node), field(11, attribute)])
    training = field(pick(chance, [1, 2]), inner)
    return pick(
        chance,
        [
            (INITIALIZER, tensor),
            (INITIALIZER, tensor),
            (SPARSE, sparse),
            (NODE, node),
            (NODE, choice),
            (-FUNCTIONS, function),
            (-TRAINING, training),
            (-GRAPH, inner),  # a second graph, which parsers merge into the first
        ],
    )


def foreign(chance: Chance) -> tuple[int, bytes]:
    """Code of others: domains, endless loops, functions under a standard operator's name."""
    padding = int(chance.integers(3))
    domain = pick(chance, [b"com.microsoft", b"ai.onnx.contrib", b"pyop", b"com.evil", b"AI.ONNX"])
    context = field(1, b"ep_cache_context") + field(4, b"../engine.bin") + field(20, 3)
    node = field(4, b"EPContext") + field(5, context) + field(7, domain, padding)
    body = field(2, b"body") + field(NODE, field(4, b"Identity"))
    loop = field(4, b"Loop") + field(5, field(1, b"body") + field(6, body, padding))
    function = field(1, b"Conv") + field(10, b"") + field(7, field(4, b"Identity"))
    return pick(
        chance,
        [
            (NODE, node),
            (NODE, loop),
            (-OPSET, field(1, domain, padding) + field(2, 1)),
            (-FUNCTIONS, function),
        ],
    )


def forbidden(folder: Path, chance: Chance) -> None:
    """A graph that asks for a file or code that is not its own, under sound hashes."""
    path = folder / f"{pick(chance, GRAPHS)}.onnx"
    if chance.integers(20) == 0:  # flatbuffers, which onnxruntime looks for first
        write(path, b"\x20\0\0\0ORTM" + path.read_bytes())
    else:
        model = onnx.load(path)
        number, content = (holder, foreign)[int(chance.integers(4) == 0)](chance)
        inside = model.graph.SerializeToString()
        del model.graph.node[:]
        model.ClearField("graph")
        if number > 0:
            extra = field(number, content, int(chance.integers(3)))
            inside = extra + inside if chance.integers(2) else inside + extra
            content = b""
        outside = field(-number, content) if content else b""
        write(path, model.SerializeToString() + field(GRAPH, inside) + outside)
    reseal(folder)


def sound(folder: Path, chance: Chance) -> None:
    """The counterpart: odd spelling and unknown fields, but nothing asked for. It must open."""
    path = folder / f"{pick(chance, GRAPHS)}.onnx"
    model = onnx.load(path)
    helper.set_model_props(model, {"note": "location /etc/passwd"})
    padding = int(chance.integers(1, 3))  # a length may take five bytes, three are needed
    inside = model.graph.SerializeToString() + field(10, b"a note: location", padding)
    model.ClearField("graph")
    write(path, model.SerializeToString() + field(GRAPH, inside, padding))
    reseal(folder)
