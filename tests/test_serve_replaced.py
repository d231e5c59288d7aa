"""New weights under running servers, and bad ones; a server that is killed, and the next one.

The servers are the command line's own, each in a process of its own.
"""

import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heartbeat_export import store
from heartbeat_fast.bundle import Bundle
from tests.fixtures_web import ask
from tests.test_rebuild_reload import altered, switch

client = pytest.importorskip("websockets.sync.client", reason="websockets comes with `web`")
closed = pytest.importorskip("websockets.exceptions").ConnectionClosed
pytest.importorskip("pyigtl", reason="pyigtl comes with [serve]")
Reader = pytest.importorskip("tests.test_igtl").Reader

LONGEST_GAP = 5.0  # seconds between two frames; a server that stops to load would freeze for good


@dataclass(frozen=True)
class Server:
    """A running `heartbeat serve`."""

    process: subprocess.Popen[str]
    port: int
    log: Path

    def warnings(self) -> list[str]:
        """What it said on stderr."""
        return [line for line in self.log.read_text().splitlines() if "warning" in line]


@contextmanager
def command(kind: str, folder: Path, log: Path, port: int = 0) -> Iterator[Server]:
    """`heartbeat serve KIND` on a bundle; yields once it has said where it listens."""
    arguments = ["serve", kind, "--port", str(port), "--bundle", str(folder)]
    start = [sys.executable, "-m", "heartbeat_fast.cli", *arguments, "--engine", "onnxruntime"]
    steps = ["--steps", "2"] if kind == "igtl" else []
    with log.open("w") as stderr:
        process = subprocess.Popen(start + steps, stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        found = re.search(r":(\d+)", said)
        assert found, f"{said!r}; {log.read_text()}"
        yield Server(process, int(found[1]), log)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def bundle(nano_bundle: Bundle, tmp_path: Path) -> Bundle:
    return Bundle.open(shutil.copytree(nano_bundle.path, tmp_path / "bundle"))


class Watcher:
    """A client that does nothing but look; notes when each frame came."""

    def __init__(self, port: int) -> None:
        self.reader, self.times = Reader(port), list[float]()
        self.ended = False
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        with suppress(OSError):
            while self.reader.image() is not None:
                self.times.append(time.monotonic())
        self.ended = True


def test_igtl_goes_on_while_its_bundle_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    with command("igtl", bundle.path, tmp_path / "log") as server:
        reader, watcher = Reader(server.port), Watcher(server.port)

        def asked(ef: float) -> dict[str, Any]:
            """The status once a changed wish is shown."""
            reader.say(ef=ef)
            return dict(
                reader.until_status(lambda s: s["ef"] == ef and s["shown_version"] == s["version"])
            )

        first = asked(60)
        assert first["weights"] == bundle.manifest.fingerprints["weights"]
        switch(bundle, 0.5)
        assert asked(30)["weights"] == "0.5"
        assert server.warnings() == []

        broken = switch(bundle, 0.25)
        altered(broken)
        after = asked(20)
        assert (after["weights"], after["fault"], after["faults"]) == ("0.5", None, 0)
        asked(25)
        (said,) = server.warnings()  # once
        assert "new weights passed over, the old go on: " in said
        assert "truncated" in said

        store.rollback(bundle.path)
        switch(bundle, 0.75)
        assert asked(40)["weights"] == "0.75"
        assert not watcher.ended
        assert np.diff(watcher.times).max() < LONGEST_GAP
        assert asked(50)["clients"] == 2


class Stream:
    """A viewer; checks that no frame is left out of what it gets."""

    def __init__(self, port: int) -> None:
        self.socket = client.connect(f"ws://127.0.0.1:{port}/v1/stream", open_timeout=60)
        self.number, self.came, self.gap = 0, time.monotonic(), 0.0

    def asked(self, revision: int, ef: float) -> dict[str, Any]:
        """The header of the first frame of changed controls."""
        self.socket.send(json.dumps({"revision": revision, "ef": ef, "steps": 2}))
        while (header := self.header())["revision"] != revision:
            pass
        return header

    def header(self) -> dict[str, Any]:
        message = self.socket.recv(timeout=60)
        assert isinstance(message, bytes), message
        length = struct.unpack("<I", message[:4])[0]
        header = dict(json.loads(message[4 : 4 + length]))
        assert header["number"] == self.number + 1
        now = time.monotonic()
        self.gap = max(self.gap, now - self.came) if self.number else 0.0
        self.number, self.came = header["number"], now
        return header


def clip(address: str, folder: Path) -> dict[str, Any]:
    """The provenance of a clip made now."""
    status, _, content = ask(address, "/v1/clips", {"steps": 2}, Accept="application/x-npz")
    assert status == 200, content
    (folder / "clip.npz").write_bytes(content)
    with np.load(folder / "clip.npz") as arrays:
        return dict(json.loads(str(arrays["provenance"])))


def test_web_goes_on_while_its_bundle_is_replaced(bundle: Bundle, tmp_path: Path) -> None:
    with command("web", bundle.path, tmp_path / "log") as server:
        address = f"127.0.0.1:{server.port}"
        stream = Stream(server.port)
        first = bundle.manifest.fingerprints["weights"]
        assert stream.asked(1, 60)["weights"] == first
        assert json.loads(ask(address, "/v1/info")[2])["weights"] == first

        switch(bundle, 0.5)
        assert stream.asked(2, 30)["weights"] == "0.5"
        assert clip(address, tmp_path)["weights"] == "0.5"
        assert json.loads(ask(address, "/v1/info")[2])["weights"] == "0.5"
        assert server.warnings() == []

        altered(switch(bundle, 0.25))
        after = stream.asked(3, 20)
        assert (after["weights"], after["fault"]) == ("0.5", None)
        assert clip(address, tmp_path)["weights"] == "0.5"
        assert ask(address, "/health/ready")[0] == 200
        (said,) = server.warnings()
        assert "new weights passed over, the old go on: " in said
        assert "truncated" in said

        store.rollback(bundle.path)
        switch(bundle, 0.75)
        assert stream.asked(4, 40)["weights"] == "0.75"
        shutil.rmtree(bundle.path)  # a folder that goes away is not missed either
        assert stream.asked(5, 55)["weights"] == "0.75"
        assert stream.gap < LONGEST_GAP
        status, _, content = ask(address, "/v1/info")
        assert (status, list(json.loads(content))) == (503, ["error"])


def first_frame(kind: str, port: int) -> Callable[[], Any]:
    """Connects, waits for a frame; gives what reads the next one."""
    following: Callable[[], Any] = Reader(port).image if kind == "igtl" else Stream(port).header
    assert following() is not None
    return following


@pytest.mark.parametrize("kind", ["igtl", "web"])
def test_a_killed_server_frees_its_port_and_clients_come_back(
    kind: str, nano_bundle: Bundle, tmp_path: Path
) -> None:
    with command(kind, nano_bundle.path, tmp_path / "log") as server:
        following = first_frame(kind, server.port)
        server.process.kill()  # as an engine that takes the process down
        server.process.wait(30)
        with pytest.raises((OSError, closed)):
            all(following() for _ in range(1000))  # what was on its way, then the end
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        with command(kind, nano_bundle.path, tmp_path / "log2", server.port) as again:
            assert again.port == server.port
            first_frame(kind, again.port)
