"""The web server over real sockets: clips, frames, refusals, load, and 10,000 nonsense messages."""

import base64
import io
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heartbeat_fast.bundle import Bundle
from heartbeat_fast.cli import main
from heartbeat_fast.conditions import Conditions
from heartbeat_fast.errors import ConditionError, HeartBeatError, ServeError
from heartbeat_fast.formats import open_record
from heartbeat_fast.generator import Generator
from heartbeat_fast.serve.application import MOST_VIEWERS, Settings
from heartbeat_fast.serve.messages import accepted, array, clip_request, parsed
from heartbeat_fast.serve.scene import Controls
from heartbeat_fast.serve.worker import LONGEST_QUEUE
from tests.fixtures_web import ask, serving

client = pytest.importorskip("websockets.sync.client", reason="websockets comes with `web`")
closed = pytest.importorskip("websockets.exceptions").ConnectionClosed

F, SIDE = 4, 64  # of the nano bundle


@pytest.fixture(scope="module")
def generator(nano_bundle: Bundle) -> Generator:
    return Generator.open(nano_bundle, "onnxruntime")


@pytest.fixture(scope="module")
def address(generator: Generator) -> Iterator[str]:
    with serving(generator) as address:
        yield address


def npy(values: Any) -> str:
    stream = io.BytesIO()
    np.save(stream, values)
    return base64.b64encode(stream.getvalue()).decode()


def frame(message: bytes) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Header, grey and overlay of a binary message, as another host would read it."""
    length = struct.unpack("<I", message[:4])[0]
    header = json.loads(message[4 : 4 + length])
    shape = (2, header["height"], header["width"])
    grey, overlay = np.frombuffer(message, np.uint8, offset=4 + length).reshape(shape)
    return header, grey, overlay


def sentence(content: bytes) -> str:
    said = json.loads(content)
    assert list(said) == ["error"]
    return str(said["error"])


def test_health_and_facts(address: str) -> None:
    assert ask(address, "/health/live")[0] == 200
    status, headers, content = ask(address, "/health/ready")
    assert (status, json.loads(content)["status"]) == (200, "ready")
    assert "default-src 'self'" in headers["content-security-policy"]
    facts = json.loads(ask(address, "/v1/info")[2])
    assert (facts["bundle"], facts["frames"], facts["size"]) == ("nano", F, SIDE)
    assert facts["notice"] == "synthetic, not for diagnosis"
    for path in ("/", "/page/main.js", "/page/style.css"):
        assert ask(address, path)[0] == 200
    assert ask(address, "/page/../web.py")[0] == 404


def test_not_ready_says_why(nano_bundle: Bundle) -> None:
    from heartbeat_fast.serve.worker import Worker

    generator = Generator.open(nano_bundle, "onnxruntime")
    generator.engine.run = None  # type: ignore[method-assign, assignment]
    worker = Worker(generator)
    worker.start()
    deadline = time.monotonic() + 20
    while worker.failure is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert worker.failure is not None
    assert worker.failure.startswith("warm-up failed: ")
    assert not worker.ready.is_set()
    with pytest.raises(HeartBeatError, match="warm-up failed"):
        worker.ask(lambda: (Conditions(), {}))
    worker.stop()


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("application/x-npz", ".npz"),
        ("application/dicom", ".dcm"),
        ("image/gif", ".gif"),
        ("video/mp4", ".mp4"),
    ],
)
def test_clips_in_the_kind_that_is_accepted(
    address: str, generator: Generator, tmp_path: Path, kind: str, suffix: str
) -> None:
    mask = np.zeros((F, SIDE, SIDE), np.uint8)
    mask[:, 20:40, 25:40] = 1
    body = {
        "conditions": {"text": "An ECHO with 4-chamber view.", "ef": 40, "mask": npy(mask)},
        "steps": 2, "seed": 5, "fps": 20, "spacing_mm": [0.5, 0.5], "mark": False,
    }  # fmt: skip
    status, headers, content = ask(address, "/v1/clips", body, Accept=kind)
    assert status == 200, content
    assert headers["content-type"] == kind
    assert headers["x-synthetic"] == "true"
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content)
    record = open_record(path)
    assert record.frames.shape[1:] == (SIDE, SIDE)
    if suffix != ".gif":  # which shows equal frames once, for longer
        assert len(record.frames) == F
        assert record.fps == pytest.approx(20)
    if suffix in (".npz", ".dcm"):
        given = Conditions(text=body["conditions"]["text"], ef=40, mask=mask, frames=F, size=SIDE)
        assert np.array_equal(record.frames, generator(given, steps=2, seed=5).frames)
        assert record.spacing_mm == pytest.approx((0.5, 0.5))


def test_clip_of_the_pages_controls(address: str, tmp_path: Path) -> None:
    body = {"controls": {"ef": 30, "heart_rate": 60, "steps": 2, "valve": [2.0, -3.0]}}
    status, _, content = ask(address, "/v1/clips", body, Accept="application/x-npz")
    assert status == 200, content
    (tmp_path / "clip.npz").write_bytes(content)
    with np.load(tmp_path / "clip.npz") as arrays:
        assert arrays["fps"] == F - 1
        assert float(arrays["ef"]) == 30
        assert set(np.unique(arrays["mask"])) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 422, "not JSON"),
        (b"[" * 100_000, 422, "not JSON"),
        ([], 422, "wanted a JSON object"),
        ({"step": 4}, 422, "'step' unknown"),
        ({"steps": 7}, 422, "steps: 7 came"),
        ({"steps": "four"}, 422, "steps: 'four' came"),
        ({"sampler": "magic"}, 422, "sampler: 'magic' came"),
        ({"guidance": -1}, 422, "guidance -1"),
        ({"seed": 2**70}, 422, "seed"),
        ({"fps": 0}, 422, "fps: 0 came"),
        ({"spacing_mm": [1]}, 422, "spacing_mm: [1] came"),
        ({"mark": "no"}, 422, "mark: 'no' came"),
        ({"deadline_s": 1e9}, 422, "deadline_s"),
        ({"deadline_s": 1e-6, "steps": 50}, 504, "deadline: passed"),
        ({"conditions": {"ef": "NaN"}}, 422, "ef: "),
        ({"conditions": {"mask": "???"}}, 422, "mask: not a .npy file"),
        ({"conditions": {"mask": npy(np.zeros((3, 3), int))}}, 422, "mask: "),
        ({"conditions": {"mask": npy(np.array([None], object).astype("S4"))}}, 422, "not a .npy"),
        ({"conditions": {"eye": 1}}, 422, "'eye' unknown"),
        ({"controls": {"ef": 300}}, 422, "ef: 300 came; wanted 15 to 80"),
        ({"controls": {"use": ["image"]}}, 422, "no image was given"),
        ({"controls": {}, "conditions": {}}, 422, "wanted one of them"),
    ],
)
def test_wrong_bodies_get_a_sentence(address: str, body: Any, status: int, says: str) -> None:
    found, _, content = ask(address, "/v1/clips", body)
    assert says in sentence(content)
    assert found == status
    assert "\n" not in sentence(content)


def test_other_refusals(address: str) -> None:
    assert ask(address, "/v1/clips", b"{}", Content_Type="text/plain")[0] == 415
    assert ask(address, "/v1/clips", {}, Accept="text/html")[0] == 406
    assert ask(address, "/v1/clips")[0] == 405
    assert ask(address, "/nowhere")[0] == 404
    huge = struct.pack("<Q", 0) * (7 * 2**20)  # 56 MiB
    status, _, content = ask(address, "/v1/clips", huge)
    assert (status, "too long" in sentence(content)) == (413, True)


def test_a_lying_array_is_not_allocated() -> None:
    stream = io.BytesIO()
    header = {"descr": "<f8", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(ConditionError, match=r"mask: not a \.npy file of numbers"):
        array("mask", base64.b64encode(stream.getvalue()).decode())


def test_no_pickle_is_read() -> None:
    with pytest.raises(ConditionError, match=r"mask: not a \.npy file of numbers"):
        array("mask", npy(np.array([{"a": 1}], object)))


def test_accept_header() -> None:
    assert accepted("") == ("video/mp4", ".mp4")
    assert accepted("image/gif;q=0, application/dicom") == ("application/dicom", ".dcm")
    assert accepted("text/html,*/*;q=0.8") == ("video/mp4", ".mp4")
    assert accepted("text/html") is None


def test_hosts_and_origins(address: str) -> None:
    assert ask(address, "/v1/info", Host="evil.example")[0] == 403
    assert ask(address, "/v1/info", Origin="http://evil.example")[0] == 403
    assert ask(address, "/v1/info", Origin=f"http://{address}")[0] == 200
    with pytest.raises(Exception, match="403"):
        client.connect(f"ws://{address}/v1/stream", origin="http://evil.example")


def test_port_in_use_is_said_before_a_bundle_is_opened(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code = main(["serve", "web", "--port", port, "--bundle", "/no/such/bundle"])
    said = capsys.readouterr().err
    assert code == 2
    assert f"127.0.0.1:{port}: cannot listen" in said
    assert said.count("\n") == 1


def test_token(generator: Generator) -> None:
    with pytest.raises(ServeError, match=r"0\.0\.0\.0 is open to the network; wanted a token"):
        Settings("0.0.0.0")
    with serving(generator, Settings("0.0.0.0", token="s3cret")) as address:
        assert ask(address, "/")[0] == 200
        assert ask(address, "/v1/info")[0] == 401
        assert ask(address, "/v1/info", Authorization="Bearer wrong")[0] == 401
        assert ask(address, "/v1/info", Authorization="Bearer s3cret")[0] == 200
        with pytest.raises(Exception, match="403"):
            client.connect(f"ws://{address}/v1/stream?token=wrong")
        with client.connect(f"ws://{address}/v1/stream?token=s3cret") as stream:
            assert frame(stream.recv(timeout=30))[0]["kind"] == "frame"


class Gate:
    """An engine whose denoiser waits until it is let through, or fails."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.open, self.fails = engine, threading.Event(), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, graph: str, inputs: Any) -> Any:
        if graph == "denoise":
            assert self.open.wait(60)
            if self.fails:
                raise RuntimeError("the device fell off the bus\nwith details")
        return self.engine.run(graph, inputs)


def test_under_load_429_and_faults_do_not_stay(nano_bundle: Bundle, capsys: Any) -> None:
    gate = Gate(Generator.open(nano_bundle, "onnxruntime").engine)
    gate.open.set()
    with serving(Generator(nano_bundle, gate)) as address, ThreadPoolExecutor(32) as pool:
        gate.open.clear()
        started = [pool.submit(ask, address, "/v1/clips", {"steps": 1}) for _ in range(20)]
        deadline = time.monotonic() + 30
        while sum(f.done() for f in started) < 20 - 1 - LONGEST_QUEUE:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        gate.open.set()
        answers = [future.result() for future in started]
        refused = [answer for answer in answers if answer[0] == 429]
        assert len(refused) == 20 - 1 - LONGEST_QUEUE
        assert all(int(headers["retry-after"]) >= 1 for _, headers, _ in refused)
        assert {status for status, _, _ in answers} == {200, 429}
        gate.fails = True
        status, _, content = ask(address, "/v1/clips", {"steps": 1})
        assert status in (500, 503)
        assert "\n" not in sentence(content)
        gate.fails = False
        assert ask(address, "/v1/clips", {"steps": 1})[0] == 200


def test_stream_follows_the_controls(address: str) -> None:
    with client.connect(f"ws://{address}/v1/stream") as stream:
        stream.send(json.dumps({"revision": 7, "ef": 60, "steps": 2}))
        header, grey, overlay = shown(stream, 7)
        assert grey.shape == (SIDE, SIDE)
        assert set(np.unique(overlay & 3)) == {0, 1, 2, 3}
        assert (overlay >> 2).max() > 30, "the valve is drawn"
        assert header["steps"] == 2
        assert header["synthetic"] is True
        stream.send(json.dumps({"revision": 8, "use": ["text"], "ef": 20}))
        header, *_ = shown(stream, 8)
        assert header["conditions"] == ["text"]
        assert header["latency_ms"] > 0
        stream.send(json.dumps({"ef": 500}))
        while not isinstance(message := stream.recv(timeout=30), str):
            pass
        assert json.loads(message)["error"] == "ef: 500 came; wanted 15 to 80"


def shown(stream: Any, revision: int) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """The first frame of a revision."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        message = stream.recv(timeout=30)
        if isinstance(message, bytes) and (found := frame(message))[0]["revision"] == revision:
            return found
    raise AssertionError(f"revision {revision} was never shown")


def test_latest_wins(address: str) -> None:
    with client.connect(f"ws://{address}/v1/stream") as stream:
        shown(stream, 0)
        for revision in range(1, 101):
            stream.send(json.dumps({"revision": revision, "ef": 20 + revision / 2, "steps": 10}))
        header, *_ = shown(stream, 100)
        assert header["clips"] < 60


def test_who_says_what_it_saw_is_not_flooded(address: str) -> None:
    with client.connect(f"ws://{address}/v1/stream") as stream:
        stream.send(json.dumps({"seen": 0}))
        numbers = []
        with suppress(TimeoutError):
            while len(numbers) < 10:
                numbers.append(frame(stream.recv(timeout=3))[0]["number"])
        assert 1 <= len(numbers) <= 3
        stream.send(json.dumps({"seen": numbers[-1]}))
        assert frame(stream.recv(timeout=30))[0]["number"] == numbers[-1] + 1


def test_too_many_viewers(address: str) -> None:
    url = f"ws://{address}/v1/stream"
    viewers = [client.connect(url) for _ in range(MOST_VIEWERS)]
    try:
        for viewer in viewers:
            viewer.recv(timeout=60)
        with client.connect(url) as one_more, pytest.raises(closed) as refused:
            one_more.recv(timeout=30)
        assert refused.value.rcvd.code == 1013
    finally:
        for viewer in viewers:
            viewer.close()


def nonsense(rng: random.Random) -> str | bytes:
    """A message somebody might send: near misses, wrong types, broken JSON, bytes."""
    good = {
        "revision": 1, "ef": 50, "heart_rate": 80, "use": ["mask"], "valve": [1, 2], "steps": 4,
        "paint": {"frame": 1, "labels": "AAAA", "carry": "copy"}, "image": "AAAA", "view": "A2C",
    }  # fmt: skip
    wrong = [None, True, -1, 1e308, float("nan"), "x" * 50, [], {}, [[]], {"a": {}}, 2**80, "A2C"]
    match rng.randrange(5):
        case 0:
            return rng.randbytes(rng.randrange(64))
        case 1:
            return json.dumps(rng.choice(wrong))
        case 2:
            text = json.dumps(good)
            cut = rng.randrange(len(text))
            return text[:cut] + chr(rng.randrange(32, 0x2FF)) + text[cut + rng.randrange(3) :]
        case 3:
            return json.dumps({rng.choice(list(good)): rng.choice(wrong)})
        case _:
            return "[" * rng.randrange(1, 3000)


def test_ten_thousand_messages_of_nonsense(address: str, capsys: Any) -> None:
    rng = random.Random(0)
    answered = 0
    with client.connect(f"ws://{address}/v1/stream") as stream:
        stream.send(json.dumps({"seen": 0}))  # frames wait while errors are read

        def listen() -> None:
            nonlocal answered
            for message in stream:
                answered += isinstance(message, str)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        for _ in range(10_000):
            stream.send(nonsense(rng))
    listener.join(30)
    assert answered > 5_000
    with client.connect(f"ws://{address}/v1/stream") as stream:
        shown(stream, 0)
    assert ask(address, "/health/ready")[0] == 200
    assert "Traceback" not in capsys.readouterr().err


def test_ten_thousand_bodies_of_nonsense() -> None:
    rng = random.Random(1)
    refused = 0
    for _ in range(10_000):
        message = nonsense(rng)
        body = message if isinstance(message, bytes) else message.encode()
        try:
            clip_request(body, F, SIDE)
            Controls().updated(parsed(body), F, SIDE)
        except HeartBeatError:
            refused += 1
    assert refused > 8_000


def exhaust(stream: Any) -> None:
    while True:
        stream.recv(timeout=30)


def test_a_message_of_a_gigabyte_is_cut_short(address: str) -> None:
    with client.connect(f"ws://{address}/v1/stream", max_size=None) as stream:
        shown(stream, 0)
        piece = "x" * 2**16

        def pieces() -> Iterator[str]:
            for _ in range(2**14):
                yield piece

        with suppress(closed):
            stream.send(pieces())
        with pytest.raises(closed):
            exhaust(stream)
    assert ask(address, "/health/live")[0] == 200
