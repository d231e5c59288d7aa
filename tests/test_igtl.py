"""OpenIGTLink as others speak it: pyigtl's own client, a plain socket, and misbehaving ones."""

import json
import random
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from heartbeat_fast.anatomy import sample_anatomy
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.controls import Settings
from heartbeat_fast.errors import HeartBeatError, ServeError
from heartbeat_fast.generator import Generator
from heartbeat_fast.serve import igtl, wire
from heartbeat_fast.serve.igtl import IgtlServer
from heartbeat_fast.serve.wire import Broken, Pose, WireError
from heartbeat_fast.stream import Session
from tests.fixtures_toy import FRAMES, SIZE, ToyEngine, toy_bundle

pyigtl = pytest.importorskip("pyigtl", reason="pyigtl comes with [serve]")
messages = pytest.importorskip("pyigtl.messages")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def session(bundle: Bundle) -> Iterator[Session]:
    generator = Generator(bundle, ToyEngine(bundle))
    with Session(generator, Settings(steps=4), anatomy=3, ef=60) as opened:
        yield opened


@pytest.fixture
def server(session: Session) -> Iterator[IgtlServer]:
    with IgtlServer(session, port=0, rate=50) as running:
        yield running


class Reader:
    """A blocking client: what a simulator's receive loop does."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)

    def message(self) -> tuple[dict[str, Any], Any]:
        header = messages.MessageBase.parse_header(self.exactly(58))
        body = self.exactly(header["body_size"])
        found = messages.MessageBase.create_message(header["message_type"])
        found.unpack(header, body)
        return header, found

    def exactly(self, count: int) -> bytes:
        content = b""
        while len(content) < count:
            content += (got := self.socket.recv(min(count - len(content), 2**16)))
            if not got:
                raise ConnectionError("closed")
        return content

    def image(self) -> Any:
        while True:
            header, message = self.message()
            if header["message_type"] == "IMAGE":
                return message

    def status(self) -> dict[str, Any]:
        while True:
            header, message = self.message()
            if header["device_name"] == wire.STATUS:
                return dict(json.loads(message.string))

    def until_status(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        end = time.monotonic() + 20
        while not true(status := self.status()):
            assert time.monotonic() < end, status
        return status

    def say(self, **fields: Any) -> None:
        text = messages.StringMessage(json.dumps(fields), device_name=wire.CONDITION)
        self.socket.sendall(text.pack())


@pytest.fixture
def reader(server: IgtlServer) -> Iterator[Reader]:
    client = Reader(server.port)
    yield client
    client.socket.close()


def test_images_have_spacing_and_the_time_of_their_making(reader: Reader, session: Session) -> None:
    image = reader.image()
    assert image.device_name == "Echo"
    assert image.image.shape == (1, SIZE, SIZE)
    assert image.image.dtype == np.uint8
    rows, columns = session.spacing_mm
    spacing = np.linalg.norm(image.ijk_to_world_matrix[:3, :3], axis=0)
    assert spacing == pytest.approx([columns, rows, 1.0])
    assert abs(time.time() - image.timestamp) < 5
    again = [reader.image() for _ in range(8)]
    stamps = [message.timestamp for message in again]
    assert stamps == sorted(stamps)
    made = session.next().frames
    assert all((message.image[0] == made).all((1, 2)).any() for message in again)


def test_pyigtls_own_client_steers(server: IgtlServer, session: Session) -> None:
    client = pyigtl.OpenIGTLinkClient("127.0.0.1", server.port)
    try:
        assert client.wait_for_message("Echo", timeout=20).image.shape == (1, SIZE, SIZE)
        text = messages.StringMessage('{"ef": 31.5}', device_name=wire.CONDITION)
        client.send_message(text, wait=False)
        end = time.monotonic() + 20
        while session.wish.values["ef"] != 31.5:
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        client.stop()


def test_conditions_come_as_json_and_images(reader: Reader, session: Session) -> None:
    reader.say(schema_version=1, ef=25, heart_rate=90, text="An ECHO.", seed=4)
    status = reader.until_status(lambda s: s["ef"] == 25 and s["shown_version"] == s["version"])
    assert status["heart_rate"] == 90
    assert status["error"] is None
    assert status["synthetic"] is True
    labels = np.zeros((FRAMES, SIZE, SIZE), np.uint8)
    labels[:, 20:40, 20:40] = 1
    reader.socket.sendall(messages.ImageMessage(labels, device_name="EchoMask").pack())
    sketch = np.zeros((1, SIZE, SIZE), np.uint8)
    sketch[0, 5] = 255
    reader.socket.sendall(messages.ImageMessage(sketch, device_name="EchoSketch").pack())
    reader.until_status(lambda s: session.wish.values.get("sketch") is not None)
    assert (session.wish.values["mask"] == labels).all()
    assert (session.wish.values["sketch"] == sketch[0] / 255).all()
    reader.say(mask=None)
    reader.until_status(lambda s: session.wish.values["mask"] is None)


def test_a_moved_probe_moves_the_heart(reader: Reader, session: Session) -> None:
    heart = sample_anatomy(3, coverage=1.0)
    assert wire.under(heart, Pose(0, 0, 0, 0)) == heart
    assert wire.under(None, Pose(1, 0, 0, 0)) is None
    right = wire.under(heart, Pose(10, 0, 0, 0))
    assert right is not None
    assert right.apex == pytest.approx((heart.apex[0] - 10, heart.apex[1]))
    # Turned about the probe's tip, the axis from annulus to apex turns as the apex does.
    turned = wire.under(heart, Pose(0, 0, 0, 10))
    assert turned is not None
    assert np.hypot(*turned.apex) == pytest.approx(np.hypot(*heart.apex))
    before = np.arctan2(heart.apex[1], heart.apex[0]) - np.arctan2(*turned.apex[::-1])
    axis = [np.arctan2(-np.cos(h.tilt), -np.sin(h.tilt)) for h in (heart, turned)]
    assert axis[0] - axis[1] == pytest.approx(before)

    matrix = np.eye(4)
    matrix[:3, 3] = 12, 3, 40
    transform = messages.TransformMessage(matrix, device_name="Probe")
    reader.socket.sendall(transform.pack())
    status = reader.until_status(lambda s: s["probe"] is not None)
    assert status["probe"] == {"x": 12, "y": 3, "z": 40, "angle": 0}
    assert session.wish.anatomy == wire.under(heart, Pose(12, 3, 40, 0))
    version = session.wish.version
    matrix[0, 3] += 0.4  # a hand trembles
    reader.socket.sendall(messages.TransformMessage(matrix, device_name="Probe").pack())
    reader.say(anatomy=5)  # another heart lies under the same probe
    reader.until_status(lambda s: s["version"] > version)
    five = sample_anatomy(5, coverage=1.0)
    assert session.wish.anatomy == wire.under(five, Pose(12, 3, 40, 0))
    assert session.wish.version == version + 1


def test_a_client_that_does_not_read_delays_nobody(server: IgtlServer) -> None:
    slow, quick = Reader(server.port), Reader(server.port)
    for reader in (quick, slow):
        reader.image()
    stamps = [quick.image().timestamp for _ in range(100)]
    gaps = np.diff(stamps)
    assert np.median(gaps) == pytest.approx(1 / 50, abs=0.01)
    until = time.monotonic() + 20
    while not any(client.dropped for client in server.clients):
        quick.image()
        assert time.monotonic() < until
    late = time.time() - slow.image().timestamp
    assert late > 0  # what the kernel had kept for it
    assert len(server.clients) == 2


def test_a_stalled_client_is_let_go(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(igtl, "STALLED", 0.3)
    with IgtlServer(session, port=0, rate=200) as server:
        stalled, other = Reader(server.port), Reader(server.port)
        stalled.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        end = time.monotonic() + 20
        while len(server.clients) != 1 or not other.image():
            other.image()
            assert time.monotonic() < end
        assert other.image() is not None


def test_a_gigabyte_is_refused_before_it_is_held(server: IgtlServer, reader: Reader) -> None:
    greedy = Reader(server.port)
    greedy.image()
    block = bytes(2**28)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = struct.pack("> H 12s 20s II Q Q", 1, b"IMAGE", b"EchoMask", 0, 0, 2**30, 0)
    greedy.socket.sendall(header)
    with pytest.raises(OSError, match=r"reset|pipe|aborted"):
        greedy.socket.sendall(block)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert reader.image() is not None


def test_noise_on_the_line_ends_that_line_only(server: IgtlServer, reader: Reader) -> None:
    for noise in (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + bytes(40), b"\xff" * 200):
        odd = Reader(server.port)
        odd.socket.sendall(noise)
        with pytest.raises((ConnectionError, OSError)):
            odd.exactly(2**40)
    assert reader.image() is not None
    assert server.broken == 2


def test_what_is_wrong_is_said_and_changes_nothing(reader: Reader, session: Session) -> None:
    wish = session.wish
    for fields, message in (
        ({"ef": 400}, "ef: 400 came; wanted percent"),
        ({"colour": 1}, "colour: unknown"),
        ({"schema_version": 2}, "schema_version: 2 came; wanted 1"),
        ({"anatomy": -1}, "anatomy: -1 came"),
    ):
        reader.say(**fields)
        assert message in str(reader.until_status(lambda s: s["error"])["error"])
        reader.say()  # an empty wish is no error, and takes the old one away
        reader.until_status(lambda s: s["error"] is None)
    broken = bytearray(messages.StringMessage('{"ef": 20}', device_name=wire.CONDITION).pack())
    broken[-3] ^= 1
    reader.socket.sendall(broken)
    assert "check sum" in reader.until_status(lambda s: s["error"])["error"]
    assert session.wish.version == wish.version


def fuzzed(chance: random.Random) -> bytes:
    """A message that was sound once: types, sizes, text and numbers changed at random."""
    text = chance.choice(
        ['{"ef": 30}', '{"ef": NaN}', '{"text": "\\u0000"}', "[" * 900, '{"ef": 1e999}', "{}",
         '{"heart_rate": "x", "ef": []}', '{"ef": 3, "ef": 4}', '{"anatomy": {}}', "\x00\x01"]
    )  # fmt: skip
    kinds: list[Callable[[], Any]] = [
        lambda: messages.StringMessage(text, device_name=chance.choice((wire.CONDITION, "x"))),
        lambda: messages.TransformMessage(
            np.eye(4) * chance.choice((1, np.nan, 1e30)), device_name="Probe"
        ),
        lambda: messages.ImageMessage(
            np.full((1, 3, 5), chance.randrange(256), np.uint8),
            device_name=chance.choice((*wire.PICTURES, "other")),
        ),
        lambda: messages.PointMessage(positions=[[1, 2, 3]], device_name="p"),
    ]
    packed = bytearray(chance.choice(kinds)().pack())
    for _ in range(chance.choice((0, 1, 1, 3, 30))):
        packed[chance.randrange(58, len(packed))] = chance.randrange(256)
    if chance.random() < 0.5:  # let it past the check sum
        packed[50:58] = bytes(8)
    if chance.random() < 0.2:
        packed[chance.randrange(58)] = chance.randrange(256)
    return bytes(packed)


def test_ten_thousand_fuzzed_messages(session: Session) -> None:
    """Each is done or refused by one of our errors; nothing else ever comes out."""
    server = IgtlServer(session, port=0)
    chance, refused, done, broken = random.Random(7), 0, 0, 0
    most = wire.largest(FRAMES, SIZE)
    for _ in range(10_000):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            theirs.sendall(fuzzed(chance))
            theirs.shutdown(socket.SHUT_WR)
            try:
                server._obey(wire.receive(ours, most))
                done += 1
            except (Broken, OSError):
                broken += 1
            except HeartBeatError:
                refused += 1
    server.close()
    assert done + refused + broken == 10_000
    assert min(done, refused, broken) > 500
    assert session.next().frames.shape == (FRAMES, SIZE, SIZE)


def test_a_port_in_use_is_one_sentence(server: IgtlServer, session: Session) -> None:
    with pytest.raises(ServeError, match=f"127.0.0.1:{server.port}: is in use"):
        IgtlServer(session, port=server.port)


def test_faults_are_in_the_status_and_frames_go_on(reader: Reader, session: Session) -> None:
    engine = session._maker.warm.engine
    assert isinstance(engine, ToyEngine)
    reader.image()
    engine.after = lambda graph, out: {k: v * np.nan for k, v in out.items()}
    reader.say(ef=12)
    assert "NaN" in reader.until_status(lambda s: s["fault"])["fault"]
    assert reader.image() is not None
    engine.after = lambda graph, out: out
    reader.until_status(lambda s: s["fault"] is None and s["shown_version"] == s["version"])


def test_too_many_clients_are_turned_away(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(igtl, "MAX_CLIENTS", 1)
    with IgtlServer(session, port=0) as server:
        first, second = Reader(server.port), Reader(server.port)
        first.image()
        with pytest.raises((ConnectionError, OSError)):
            second.image()


def test_only_what_is_known_is_read() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(messages.ImageMessage(np.zeros((2, 2)), device_name="CT").pack())
        with pytest.raises(WireError, match="wanted a device of EchoMask"):
            wire.receive(ours, 2**20)
        theirs.sendall(messages.PointMessage(positions=[[1, 2, 3]]).pack())
        with pytest.raises(WireError, match="'POINT': unknown type"):
            wire.receive(ours, 2**20)
    assert replace(Pose(0, 0, 0, 0), x=0.9).near(Pose(0, 0, 0, 0))
