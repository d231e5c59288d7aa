"""A session: nothing is encoded twice, changes carry over, frames never stop, faults are told."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heartbeat_export.parity import beating_ring
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.controls import Settings
from heartbeat_fast.errors import ConditionError, EngineError
from heartbeat_fast.generator import Generator
from heartbeat_fast.sampler import SamplerError
from heartbeat_fast.stream import Cancelled, DeadlineError, Session
from heartbeat_fast.takes import next_batch
from heartbeat_fast.warm import GROUPS, Memory, Warm
from tests.fixtures_toy import FRAMES, SIZE, ToyEngine, toy_bundle

SUBSETS = [(), ("text",), ("ef",), ("image",), ("mask", "flow"), ("sketch", "skeleton"), NAMES]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def engine(bundle: Bundle) -> ToyEngine:
    return ToyEngine(bundle)


@pytest.fixture
def generator(bundle: Bundle, engine: ToyEngine) -> Generator:
    return Generator(bundle, engine)


@pytest.fixture(scope="module")
def ring() -> Conditions:
    return beating_ring(FRAMES, SIZE)


def given(conditions: Conditions) -> dict[str, Any]:
    return {name: getattr(conditions, name) for name in conditions.present}


@pytest.fixture
def session(generator: Generator, ring: Conditions) -> Iterator[Session]:
    with Session(generator, Settings(steps=4), **given(ring)) as opened:
        yield opened


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_encodings_are_the_generators(
    subset: tuple[str, ...], nano_bundle: Bundle, ring: Conditions
) -> None:
    """Each encoder sees its own conditions' flags only, and that is all it reads."""
    generator = Generator.open(nano_bundle, "onnxruntime")
    conditions = ring.only(subset)
    plain = generator.encode(conditions)
    stamps = dict.fromkeys(GROUPS, 0)
    again = Warm.of(generator).encode_changed(given(conditions), stamps, Memory())
    assert (plain.local == again.local).all()
    for name, array in plain.context.items():
        assert (array == again.context[name]).all()


def test_first_clip_is_the_generators(
    session: Session, generator: Generator, ring: Conditions
) -> None:
    clip = session.next()
    assert (clip.frames == generator(ring, steps=4).frames).all()
    assert clip.provenance["carried_steps"] == 0
    assert clip.provenance["conditions"] == list(NAMES)


def test_unchanged_is_not_encoded_again(session: Session, engine: ToyEngine) -> None:
    session.next()
    engine.ran.clear()
    session.next()
    assert engine.ran == []  # the same beat again costs nothing
    session.set(ef=30)
    session.next()
    assert engine.ran == ["text", "context", "denoise", "denoise", "decode"]  # half of 4 carried
    engine.ran.clear()
    session.set(flow=None)
    session.next()
    assert engine.ran == ["local", "denoise", "denoise", "decode"]
    engine.ran.clear()
    session.set(image=None)
    session.next()
    assert engine.ran == ["context", "denoise", "denoise", "decode"]


def test_carry_is_the_share_of_steps(generator: Generator, engine: ToyEngine) -> None:
    for carry, count in ((0.0, 4), (0.25, 3), (1.0, 1)):
        session = Session(generator, Settings(steps=4, carry=carry), ef=50)
        session.next()
        session.set(ef=49)
        engine.ran.clear()
        assert session.next().provenance["carried_steps"] == 4 - count
        assert engine.ran.count("denoise") == count


def test_more_carried_is_nearer_to_the_last_clip(generator: Generator, ring: Conditions) -> None:
    def moved(carry: float) -> float:
        session = Session(generator, Settings(steps=10, carry=carry), **given(ring))
        before = session.next().frames.astype(int)
        session.set(ef=10, seed=5)
        return float(np.abs(session.next().frames - before).mean())

    distances = [moved(carry) for carry in (0.0, 0.5, 0.9)]
    assert distances[0] > distances[1] > distances[2] > 0


def test_same_values_same_version_and_buffers_are_the_hosts(session: Session) -> None:
    version = session.wish.version
    mask = np.array(session.wish.values["mask"])
    assert session.set(mask=mask, ef=session.wish.values["ef"]) == version
    mask[:, :2] = 1  # the host draws into the buffer it gave before
    assert session.set(mask=mask) == version + 1
    assert session.set(heart_rate=90) == version + 1  # a matter of playing


def test_wrong_values_change_nothing(session: Session) -> None:
    wish = session.wish
    for changes, message in (
        ({"ef": 40, "mask": np.zeros((3, 3))}, r"mask: shape \(3, 3\) came|3 rows"),
        ({"ef": float("nan")}, "ef: nan came"),
        ({"text": "heart " * 90}, "tokens came; wanted at most 77"),
        ({"heart_rate": 5}, "heart_rate: 5 came; wanted 20 to 250"),
        ({"heart_rate": "fast"}, "wanted beats per minute"),
        ({"seed": -1}, "seed: -1 came"),
        ({"anatomy": "big"}, "anatomy: 'big' came"),
        ({"colour": 1}, "colour: unknown; wanted any of text, ef"),
    ):
        with pytest.raises(ConditionError, match=message):
            session.set(**changes)
    assert session.wish is wish
    with pytest.raises(SamplerError, match="steps: 7 came"):
        Session(session._maker.warm, Settings(steps=7))
    with pytest.raises(ConditionError, match="carry: 2 came; wanted 0 to 1"):
        Settings(carry=2)


def test_anatomy_stands_in_for_masks(generator: Generator, engine: ToyEngine) -> None:
    session = Session(generator, Settings(steps=2), anatomy=3, ef=60)
    clip = session.next()
    assert clip.provenance["conditions"] == ["ef", "mask", "skeleton", "flow"]
    session.set(ef=25)
    other = session.next()
    assert clip.conditions is not None
    assert other.conditions is not None

    def stroke(conditions: Conditions) -> float:
        assert conditions.mask is not None
        area = (conditions.mask == 1).sum((1, 2))
        return float(area.min() / area[0])

    assert stroke(other.conditions) > stroke(clip.conditions) + 0.1  # contracts less
    version = session.wish.version
    assert session.set(heart_rate=120) == version + 1  # the anatomy beats otherwise
    session.set(mask=clip.conditions.mask)  # the host has its own: nothing is mixed with it
    assert session.next().provenance["conditions"] == ["ef", "mask"]
    session.set(mask=None, anatomy=4)
    engine.ran.clear()
    assert session.next().provenance["carried_steps"] == 0  # another heart


def test_arrays_of_other_libraries(session: Session, ring: Conditions) -> None:
    assert ring.skeleton is not None
    version = session.wish.version
    assert session.set(skeleton=torch.from_numpy(ring.skeleton)) == version  # the same values
    with pytest.raises(ConditionError, match="skeleton: cannot be read where it lies"):
        session.set(skeleton=torch.zeros(4, 64, 64, requires_grad=True))
    frames = session.next().frames
    shared = torch.utils.dlpack.from_dlpack(frames)
    assert shared.data_ptr() == frames.ctypes.data


def test_batches(generator: Generator) -> None:
    sessions = [Session(generator, Settings(steps=1), anatomy=seed) for seed in range(3)]
    out = torch.zeros(3, 4, 64, 64, dtype=torch.uint8)
    batch = next_batch(sessions, out)
    assert batch.ctypes.data == out.data_ptr()
    for one, session in zip(out, sessions, strict=True):
        assert (one.numpy() == session.next().frames).all()
    assert (next_batch(sessions) == batch).all()
    with pytest.raises(ConditionError, match=r"wanted uint8 \(3, 4, 64, 64\)"):
        next_batch(sessions, np.zeros((3, 4, 64, 64), np.float32))
    sessions[0].set(ef=3)
    with pytest.raises(DeadlineError):
        next_batch(sessions, timeout=0.0)


def test_deadlines_are_looked_at_between_steps(session: Session, engine: ToyEngine) -> None:
    engine.before = lambda graph: time.sleep(0.05 if graph == "denoise" else 0)
    with pytest.raises(DeadlineError, match="not ready within"):
        session.next(timeout=0.08)
    assert 1 <= engine.ran.count("denoise") < 4
    assert "decode" not in engine.ran
    engine.before = lambda graph: None
    session.next()  # and nothing is left in disorder


def test_frames_go_on_while_the_next_clip_is_made(session: Session, engine: ToyEngine) -> None:
    first = session.frame()
    gate = threading.Event()
    engine.before = lambda graph: (gate.wait(10), None)[1]
    version = session.set(ef=20)
    shown = [session.frame() for _ in range(50)]
    assert {frame.version for frame in shown} == {first.version}
    assert [frame.number for frame in shown] == list(range(2, 52))
    gate.set()
    until(lambda: session.frame().version == version)
    assert len(session.stats.latencies) == 2
    assert session.stats.faults == 0


def test_latest_wins_and_slow_sliders_do_not_stop_time(session: Session, engine: ToyEngine) -> None:
    session.frame()
    engine.before = lambda graph: time.sleep(0.03 if graph == "denoise" else 0)
    session.set(ef=1)
    until(lambda: engine.ran[-1] == "denoise")
    last = session.set(ef=2)
    until(lambda: session.frame().version == last)
    assert session.stats.cancelled == 1
    assert session.stats.clips == 2  # ef=1 was given up

    # A slider that moves faster than a clip is made: clips come all the same.
    session._maker.settings = session.settings = Settings(steps=4, patience=0.1)
    end, clips = time.monotonic() + 1.5, session.stats.clips
    for k in range(1000):
        session.set(ef=3 + k % 90)
        session.frame()
        time.sleep(0.01)
        if time.monotonic() > end:
            break
    assert session.stats.clips >= clips + 2


def test_an_engines_nan_is_told_and_playing_goes_on(session: Session, engine: ToyEngine) -> None:
    shown = session.frame()
    engine.after = lambda graph, out: {
        k: v * (np.nan if graph == "denoise" else 1) for k, v in out.items()
    }
    session.set(ef=20)
    until(lambda: session.fault is not None)
    assert "came out as NaN" in str(session.fault)
    assert session.frame().version == shown.version
    with pytest.raises(EngineError, match="came out as NaN"):
        session.next()
    engine.after = lambda graph, out: out
    until(lambda: session.fault is None)  # tried again by itself
    until(lambda: session.frame().version == session.wish.version)
    assert session._last is not None
    assert session._last.clip.provenance["carried_steps"] == 0  # nothing of the fault is kept


def test_a_crashing_engine_is_told_and_tried_again(
    session: Session, engine: ToyEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heartbeat_fast.stream.RETRY", 0.05)

    def crash(graph: str) -> None:
        raise RuntimeError("device lost\nand a long story")

    engine.before = crash
    with pytest.raises(EngineError, match=r"failed \(RuntimeError: device lost\)"):
        session.frame()
    engine.before = lambda graph: None
    until(lambda: session.fault is None)
    assert session.frame().pixels.shape == (64, 64)
    assert session.stats.faults >= 1


def test_frames_come_at_a_rate_and_late_ones_are_counted(session: Session) -> None:
    frames = session.frames(rate=50)
    next(frames)
    start = time.monotonic()
    for _ in range(10):
        next(frames)
    assert time.monotonic() - start == pytest.approx(0.2, abs=0.15)
    before = session.stats.missed
    time.sleep(0.2)
    next(frames)
    next(frames)
    assert session.stats.missed >= before + 5
    session.close()
    assert list(frames) == []


def test_varied_beats_differ_and_are_made_ahead(generator: Generator) -> None:
    with Session(generator, Settings(steps=4, vary=True), ef=50, heart_rate=250) as session:
        session.frame()
        until(lambda: session._ready is not None)
        made = session.stats.clips
        time.sleep(0.05)
        assert session.stats.clips <= made + 1  # one ahead, no more
        until(lambda: session.frame() is not None and session.stats.clips >= 4)
        assert (session.next().frames != session.next().frames).any()


def test_closing_ends_everything(session: Session, engine: ToyEngine) -> None:
    engine.before = lambda graph: time.sleep(0.02 if graph == "denoise" else 0)
    waiting: list[BaseException] = []

    def wait() -> None:
        try:
            session.frame()
        except Cancelled as error:
            waiting.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: "denoise" in engine.ran)
    session.close()
    thread.join(5)
    assert waiting
    assert engine.ran.count("denoise") < 4


def test_a_bundle_replaced_while_frames_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New weights come with the next clip, and nothing of the old ones is used for it."""
    bundle = toy_bundle(tmp_path / "bundle")
    # The toy's graphs are formulas: no file of it can be held to its manifest.
    monkeypatch.setattr("heartbeat_fast.reload.Follow._try", lambda *a: None)
    monkeypatch.setattr("heartbeat_fast.bundle.Bundle.verify", lambda self: None)
    monkeypatch.setattr("heartbeat_fast.generator.open_engine", lambda *a: ToyEngine(a[1]))
    generator = Generator.open(bundle, "toy")
    manifest = tmp_path / "bundle" / "manifest.json"
    with Session(generator, Settings(steps=4), anatomy=3, ef=50) as session:
        assert session.frame().version == 1
        old = generator.engine
        new = json.loads(manifest.read_text())
        new["fingerprints"]["weights"] = "newer"
        (tmp_path / "next.json").write_text(json.dumps(new))
        (tmp_path / "next.json").replace(manifest)
        version = session.set(ef=30)
        until(lambda: session.frame().version == version)
        made = session.next().provenance
        assert (made["weights"], made["carried_steps"]) == ("newer", 0)
        assert generator.engine is not old  # the generator and its sessions are one
        assert isinstance(generator.engine, ToyEngine)
        assert {"text", "local", "context"} <= set(generator.engine.ran)

        manifest.write_text("{")  # half written: passed over, and said
        version = session.set(ef=20)
        with pytest.warns(UserWarning, match="new weights passed over"):
            until(lambda: session.frame().version == version)
        assert session.fault is None
        assert session.next().provenance["weights"] == "newer"
