"""Faults of servers, each with the outcome that docs/embed.md declares for it."""

import errno
import json
import os
import random
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.cli import main
from heartbeat_fast.engines.base import Arrays
from heartbeat_fast.generator import Generator
from tests.fixtures_toy import ToyEngine, toy_bundle
from tests.fixtures_web import ask, serving

client = pytest.importorskip("websockets.sync.client", reason="websockets comes with `web`")

CONNECTIONS, FRAMES_EACH = 250, 40  # 10,000 malformed WebSocket frames


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def engine(bundle: Bundle) -> ToyEngine:
    return ToyEngine(bundle)


@pytest.fixture
def address(bundle: Bundle, engine: ToyEngine) -> Iterator[str]:
    with serving(Generator(bundle, engine)) as address:
        yield address


def header(stream: Any, true: Any) -> dict[str, Any]:
    """The first frame's header of which something is true; each next frame must have come."""
    for _ in range(2000):
        message = stream.recv(timeout=30)
        if isinstance(message, bytes):
            length = struct.unpack("<I", message[:4])[0]
            found = dict(json.loads(message[4 : 4 + length]))
            if true(found):
                return found
    raise AssertionError("never came")


def nan(graph: str, out: Arrays) -> Arrays:
    return {k: values * (np.nan if graph == "denoise" else 1) for k, values in out.items()}


def crash(graph: str, out: Arrays) -> Arrays:
    raise RuntimeError("the device fell off the bus\nwith details")


@pytest.mark.parametrize(("fault", "says"), [(nan, "NaN"), (crash, "fell off the bus")])
def test_an_engine_that_fails_is_told_and_the_picture_goes_on(
    fault: Any, says: str, address: str, engine: ToyEngine
) -> None:
    with client.connect(f"ws://{address}/v1/stream") as stream:
        stream.send(json.dumps({"revision": 1, "ef": 60}))
        header(stream, lambda h: h["revision"] == 1)
        engine.after = fault
        stream.send(json.dumps({"revision": 2, "ef": 30}))
        failed = header(stream, lambda h: h["fault"])
        assert says in failed["fault"]
        assert "\n" not in failed["fault"]
        assert failed["revision"] == 1  # the last clip plays on
        status, _, content = ask(address, "/v1/clips", {"steps": 4})
        assert status in (500, 503)
        assert "\n" not in json.loads(content)["error"]
        engine.after = lambda graph, out: out
        stream.send(json.dumps({"revision": 3, "ef": 40}))
        assert header(stream, lambda h: h["revision"] == 3)["fault"] is None
        assert ask(address, "/v1/clips", {"steps": 4}, Accept="image/png")[0] == 200


@pytest.mark.parametrize("where", ["fsync", "mkdir"])
def test_a_full_disk_costs_one_clip(
    where: str, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but POST /v1/clips writes; frames need no disk."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with client.connect(f"ws://{address}/v1/stream") as stream, monkeypatch.context() as patch:
        header(stream, lambda h: True)
        patch.setattr(os, where, full)
        status, _, content = ask(address, "/v1/clips", {"steps": 4}, Accept="image/png")
        assert status == 507
        assert "No space left on device" in json.loads(content)["error"]
        header(stream, lambda h: True)
    assert ask(address, "/v1/clips", {"steps": 4}, Accept="image/png")[0] == 200


@pytest.mark.parametrize("kind", ["igtl", "web"])
def test_a_port_in_use_is_one_sentence(
    kind: str, nano_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        how = ["--bundle", str(nano_bundle.path), "--engine", "onnxruntime"]
        assert main(["serve", kind, "--port", port, *how]) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port}: " in said
    assert "choose another --port" in said
    assert said.count("\n") == 1


def test_a_gigabyte_in_one_body_is_refused_and_not_kept(address: str) -> None:
    host, _, port = address.partition(":")
    block = bytes(2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with socket.create_connection((host, int(port)), timeout=60) as sender:
        head = f"POST /v1/clips HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
        sender.sendall(f"{head}Content-Length: {2**30}\r\n\r\n".encode())
        sent = 0
        with suppress(OSError):
            while sent < 2**30:
                sender.sendall(block)
                sent += len(block)
        assert sent < 2**30
        answer = b""
        with suppress(OSError):
            answer = sender.recv(2**16)
    assert not answer or b" 413 " in answer  # a client that only sends may never read it
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 160 * 1024  # 48 MiB and their copies
    assert ask(address, "/health/live")[0] == 200


def masked(payload: bytes, first: int, key: bytes = b"\1\2\3\4") -> bytes:
    """A WebSocket frame (RFC 6455, 5.2) with any first byte."""
    body = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    length = len(payload)
    size = bytes([128 | length]) if length < 126 else struct.pack("!BH", 254, length)
    return bytes([first]) + size + key + body


def malformed(rng: random.Random) -> bytes:
    """A frame that is nearly one: bits no one may set, lengths that lie, text that is none."""
    match rng.randrange(8):
        case 0:  # text that is JSON no more
            text = bytearray(b'{"ef": 50, "use": ["mask"]}')
            text[rng.randrange(len(text))] = rng.randrange(32, 127)
            return masked(bytes(text), 0x81)
        case 1:
            return masked(rng.randbytes(rng.randrange(300)), 0x82)
        case 2:  # ping, whole; its answer is a pong
            return masked(rng.randbytes(rng.randrange(125)), 0x89)
        case 3:  # begun, and perhaps never ended
            return masked(b'{"ef"', 0x01) + masked(b": 9e9}", rng.choice((0x80, 0x00)))
        case 4:  # reserved bits and opcodes
            return masked(rng.randbytes(8), rng.randrange(256))
        case 5:  # not UTF-8
            return masked(rng.randbytes(20), 0x81)
        case 6:  # not masked, or more announced than comes: up to 2^63 bytes
            return struct.pack("!BBQ", 0x82, rng.choice((127, 255)), rng.getrandbits(63))
        case _:
            return rng.randbytes(rng.randrange(1, 40))


def upgraded(address: str) -> socket.socket:
    """A connection that has become a WebSocket."""
    host, _, port = address.partition(":")
    raw = socket.create_connection((host, int(port)), timeout=30)
    raw.sendall(
        f"GET /v1/stream HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
    )
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += (got := raw.recv(4096))
        assert got, answer
    assert b" 101 " in answer.splitlines()[0]
    return raw


def rest(raw: socket.socket) -> bytes:
    """What came until the server closed. Raises: TimeoutError: it kept the line."""
    raw.settimeout(20)
    content = b""
    with suppress(ConnectionError):
        while got := raw.recv(2**16):
            content += got
    return content


def test_ten_thousand_malformed_websocket_frames(
    address: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each line is closed by the server or goes on; the server, and other viewers, stay."""
    rng, threads, turned_away = random.Random(5), threading.active_count(), 0
    with client.connect(f"ws://{address}/v1/stream") as viewer:
        header(viewer, lambda h: True)
        for _ in range(CONNECTIONS):
            with upgraded(address) as raw:
                with suppress(OSError):
                    raw.sendall(b"".join(malformed(rng) for _ in range(FRAMES_EACH)))
                    raw.shutdown(socket.SHUT_WR)
                turned_away += b"viewers already" in rest(raw)
        viewer.send(json.dumps({"revision": 9, "ef": 33}))
        assert header(viewer, lambda h: h["revision"] == 9)["fault"] is None
    assert turned_away == 0  # all were read
    assert ask(address, "/health/ready")[0] == 200
    assert threading.active_count() <= threads + 40  # the pools', no session's
    assert "Traceback" not in capfd.readouterr().err
