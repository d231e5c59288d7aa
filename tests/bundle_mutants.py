"""A thousand ways to damage or poison a bundle, from fixed seeds; test_bundle_fuzz.py opens them.

Each family is a function (folder, chance) that alters a fresh copy in place. Those that `reseal`
stand for a sender with bad intent: hashes and lengths in the manifest fit the altered file.
"""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from heartbeat_fast.bundle import GRAPHS, describe
from heartbeat_fast.sampler import MAX_BYTES

Chance = np.random.Generator
Mutant = Callable[[Path, Chance], None]
GARBAGE: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, -0.5, "", "x" * 5000, [], {}, [[]], {"": 0}),
    *("../../etc/passwd", "/dev/zero", "a/b.onnx", "text.onnx\0.txt", "..", "\x1b[2J", "nan", "١"),
]
TEXTS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "[" * 100_000, '{"a":' * 50_000]


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Changes a JSON file by what `change` does to its value, or returns in its place."""
    value = json.loads(path.read_text())
    came = change(value)
    write(path, json.dumps(value if came is None else came).encode())


def write(path: Path, content: bytes) -> None:
    """A new file: the copies are hard links, which must not be written through."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def reseal(folder: Path) -> None:
    """Makes the manifest say of every file what it is now."""

    def seal(manifest: Any) -> None:
        for entry in (*manifest["graphs"].values(), *manifest["files"].values()):
            entry.update(vars(describe(folder / entry["file"])))

    edit_json(folder / "manifest.json", seal)


def pick(chance: Chance, values: Any) -> Any:
    return values[int(chance.integers(len(values)))]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        found.append((value, key))
        if isinstance(item, dict | list):
            found += places(item)
    return found


def damaged(content: bytes, chance: Chance) -> bytes:
    """Bits flipped, cut short, made longer, a piece doubled, or nothing left."""
    data, kind = bytearray(content), int(chance.integers(6))
    if kind == 0:
        return bytes(data[: int(chance.integers(len(data)))])
    if kind == 1:
        return bytes(data) + chance.bytes(int(chance.integers(1, 5000)))
    if kind == 2:
        start, stop = sorted(chance.integers(0, len(data), 2).tolist())
        data[start:start] = data[start:stop]
        return bytes(data)
    if kind == 3 and chance.integers(8) == 0:
        return b""
    reach = min(len(data), 400) if kind == 4 else len(data)
    for at in chance.integers(0, reach, int(chance.integers(1, 9))):
        data[at] ^= 1 << int(chance.integers(8))
    return bytes(data)


def blind(folder: Path, chance: Chance) -> None:
    """A fault of disk or wire: one file damaged, lost, or in another's place."""
    path, other = (pick(chance, sorted(folder.iterdir())) for _ in range(2))
    kind = int(chance.integers(12))
    if kind == 0:
        path.unlink()
    elif kind == 1:
        write(path, other.read_bytes())
    else:
        write(path, damaged(path.read_bytes(), chance))


def manifest_values(folder: Path, chance: Chance) -> None:
    """Any value of the manifest replaced, removed, renamed, or exchanged with another."""

    def change(manifest: Any) -> None:
        spots = places(manifest)
        (home, key), (other, there) = pick(chance, spots), pick(chance, spots)
        kind = int(chance.integers(8))
        if kind == 0:
            del home[key]
        elif kind == 1 and isinstance(home, dict):
            home[f"{key}x"] = home.pop(key)
        elif kind == 2:  # exchanged, hashes of two files among others; never into itself
            home[key], other[there] = json.loads(json.dumps([other[there], home[key]]))
        else:
            home[key] = pick(chance, GARBAGE)

    edit_json(folder / "manifest.json", change)


def manifest_text(folder: Path, chance: Chance) -> None:
    """What a JSON value cannot say: keys twice, NaN, depth, size, encodings."""
    path = folder / "manifest.json"
    text = path.read_text()
    at = text.index(":", int(chance.integers(len(text) // 2))) + 1
    kind = int(chance.integers(6))
    if kind == 0:
        text = text[:at] + pick(chance, TEXTS) + text[text.index(",", at) :]
    elif kind == 1:
        text = '{"size": 64, "graphs": {}, ' + text.lstrip()[1:]
    elif kind == 2:
        text = text + " " * (5 * 2**20)
    elif kind == 3:
        write(path, text.encode("utf-16"))
        return
    elif kind == 4:
        text = text[:at] + "9" * 5000 + text[text.index(",", at) :]
    else:
        text = "﻿" + text if chance.integers(2) else text.replace('"', "'")
    write(path, text.encode())


def odd_files(folder: Path, chance: Chance) -> None:
    """A pipe, device, socket, folder, loop or link where a file should be."""
    path = pick(chance, sorted(folder.iterdir()))
    content = path.read_bytes()
    path.unlink()
    kind = int(chance.integers(7))
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(pick(chance, ["/dev/zero", "/dev/tty", "/etc/passwd", "/proc/self/mem"]))
    elif kind == 3:
        path.symlink_to(path)
    elif kind == 4:
        here = os.getcwd()
        os.chdir(folder)  # a socket's address holds 107 characters at most
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
        os.chdir(here)
    elif kind == 5:  # sparse: much announced, nothing there
        path.touch()
        os.truncate(path, 2**31 - 1)
        if path.name != "manifest.json":
            edit_json(folder / "manifest.json", lambda m: _announce(m, path.name))
    else:  # a link to the same bytes is as good as the bytes
        home = folder.parent / "elsewhere"
        write(home, content)
        path.symlink_to(home)


def _announce(manifest: Any, name: str) -> None:
    for entry in (*manifest["graphs"].values(), *manifest["files"].values()):
        if entry["file"] == name:
            entry["bytes"] = 2**31 - 1


def samplers(folder: Path, chance: Chance) -> None:
    """A poisoned sampler table under sound hashes."""
    path = folder / "samplers.json"
    kind = int(chance.integers(8))
    if kind == 0:
        write(path, damaged(path.read_bytes(), chance))
    elif kind == 1:
        write(path, pick(chance, TEXTS).encode())
    elif kind == 2:
        write(path, path.read_bytes() + b" " * MAX_BYTES)
    else:

        def change(file: Any) -> None:
            table = next(t for t in file["tables"] if (t["name"], t["steps"]) == ("dpmpp_2m", 1))
            home, key = pick(chance, [*places(table), *places(table), (file, "schema_version")])
            odd = [*GARBAGE, 1e38, 1e7, "1.0", [0.0] * 10_000, [[0.0] * 3] * 5]
            odd += [0.5, 0.9, -0.1, 500.0] * 8  # numbers that a table may have
            home[key] = pick(chance, odd)
            if kind == 3:
                file["tables"].append(table)

        edit_json(path, change)
    reseal(folder)


def tokenizer(folder: Path, chance: Chance) -> None:
    """A poisoned vocabulary under sound hashes: endless patterns, ids out of range, odd parts."""
    path = folder / "tokenizer.json"
    endless = {"type": "Replace", "pattern": {"Regex": "(a|a?)+$"}, "content": ""}
    growing = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": "  " * 90}
    kind = int(chance.integers(7))

    def change(file: Any) -> None:
        if kind == 1:
            file["normalizer"]["normalizers"].append(pick(chance, [endless, growing, {"type": 7}]))
        elif kind == 2:
            shift = pick(chance, [1, 2**31])  # other words, or none
            file["model"]["vocab"] = {k: v + shift for k, v in file["model"]["vocab"].items()}
        elif kind == 3:
            file["added_tokens"].append({**file["added_tokens"][0], "id": 9, "content": ""})
        elif kind == 4:
            file["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}}
        else:
            home, key = pick(
                chance, [s for s in places(file) if s[0] is not file["model"]["vocab"]]
            )
            home[key] = pick(chance, GARBAGE)

    if kind == 0:
        write(path, damaged(path.read_bytes(), chance))
    else:
        edit_json(path, change)
    reseal(folder)


def onnx_bytes(folder: Path, chance: Chance) -> None:
    """Random damage to a graph under sound hashes: what reaches the engine's own parser."""
    path = folder / f"{pick(chance, GRAPHS)}.onnx"
    write(path, damaged(path.read_bytes(), chance))
    reseal(folder)


def onnx_values(folder: Path, chance: Chance) -> None:
    """A graph that parses but lies: dimensions, types, names, operators, bombs."""
    path = folder / f"{pick(chance, GRAPHS)}.onnx"
    model = onnx.load(path)
    graph, kind = model.graph, int(chance.integers(8))
    node = pick(chance, graph.node)
    if kind == 0:
        pick(chance, graph.initializer).dims.append(int(pick(chance, [0, 2, 2**40, -1])))
    elif kind == 1:
        pick(chance, graph.initializer).data_type = int(chance.integers(0, 25))
    elif kind == 2:
        node.op_type = pick(chance, ["Conv", "NoSuchOp", "Loop", "Range", "", "Gather"])
    elif kind == 3:
        node.input[0] = pick(chance, ["", "nowhere", node.output[0]])
    elif kind == 4:
        dims = pick(chance, graph.input).type.tensor_type.shape.dim
        dims[-1].dim_value = int(pick(chance, [2**40, 0, -1, 3]))
    elif kind == 5:  # 4 TiB at the first run, or when the engine folds constants
        shape = helper.make_tensor("bomb_shape", TensorProto.INT64, [1], [2**40])
        graph.initializer.append(shape)
        graph.node.append(helper.make_node("ConstantOfShape", ["bomb_shape"], ["bomb"]))
        graph.node.append(helper.make_node("ReduceSum", ["bomb"], ["boom"]))
        graph.output.append(helper.make_tensor_value_info("boom", 1, [1]))
    elif kind == 6:
        model.opset_import[0].version = int(pick(chance, [0, 1, 9999, 2**62]))
    else:
        del graph.node[int(chance.integers(len(graph.node)))]
    write(path, model.SerializeToString())
    reseal(folder)
