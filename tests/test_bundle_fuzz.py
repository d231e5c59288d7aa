"""A thousand mutated bundles: one line that says why not, or a clip; nothing else happens.

They are opened in a process of its own whose address space is limited: a number in a file must not
become memory. Faults of disk and wire (hashes do not fit) must be refused or leave the clip as it
was to the bit; files with intent behind them (hashes fit) may at most make another clip of the
right form, and what asks for files or code outside the bundle is refused before an engine sees it.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heartbeat_fast import Conditions, Generator, HeartBeatError
from heartbeat_fast.bundle import Bundle
from tests import bundle_mutants, onnx_mutants

HEADROOM = 1536 * 2**20  # bytes of address space beyond what an opened bundle takes
SLOWEST = 5.0  # seconds of processor time for one bundle; most take 0.02
# How many of each family, and the outcomes it may have: refused by Bundle, before any engine;
# refused later, by the tokenizer, the sampler reader or the engine; the same clip; another clip.
# The manifest itself has no hash: of its numbers one shapes a clip, and may come out as another.
BUNDLE, LATER, SAME, ANOTHER = "refused by Bundle", "refused later", "same clip", "another clip"
START = "another clip, of another shared_start"
COUNTS = {
    "blind": (260, {BUNDLE, SAME, START}),
    "manifest_values": (200, {BUNDLE, SAME, START}),
    "manifest_text": (60, {BUNDLE, SAME}),
    "odd_files": (60, {BUNDLE, SAME}),
    "samplers": (80, {BUNDLE, LATER, SAME, ANOTHER}),
    "tokenizer": (60, {BUNDLE, LATER, SAME, ANOTHER}),
    "onnx_bytes": (80, {BUNDLE, LATER, SAME, ANOTHER}),
    "onnx_values": (60, {BUNDLE, LATER, SAME, ANOTHER}),
    "forbidden": (130, {BUNDLE}),
    "sound": (10, {SAME}),
}
FORBIDDEN = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty"),
    *("socket.connect", "pickle.find_class", "ctypes.dlopen", "os.putenv", "shutil.rmtree"),
)


@pytest.fixture(scope="module")
def opened(nano_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What became of each mutant, in order."""
    out = tmp_path_factory.mktemp("fuzz")
    command = [sys.executable, "-m", "tests.test_bundle_fuzz", str(nano_bundle.path), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (out / "log").open("wb") as log:
        done = subprocess.run(
            command, env=environment, cwd=Path(__file__).parents[1], stderr=log, timeout=550
        )
    lines = [json.loads(line) for line in (out / "outcomes.jsonl").read_text().splitlines()]
    assert done.returncode == 0, f"{lines[-1:]} then {(out / 'log').read_text()[-3000:]}"
    return lines


def test_a_thousand_were_opened(opened: list[dict[str, Any]]) -> None:
    assert len(opened) == sum(count for count, _ in COUNTS.values()) == 1000


@pytest.mark.parametrize("family", COUNTS)
def test_each_is_refused_in_one_line_or_gives_a_clip(
    opened: list[dict[str, Any]], family: str
) -> None:
    mine = [line for line in opened if line["family"] == family]
    allowed = COUNTS[family][1]
    wrong = [line for line in mine if line["outcome"] not in allowed]
    assert not wrong, wrong[:5]
    assert all("\n" not in line["message"] for line in mine)
    assert len(mine) == COUNTS[family][0]
    seen = {line["outcome"] for line in mine}
    if family not in ("blind", "manifest_text", "forbidden", "sound"):
        assert {SAME, ANOTHER} & seen  # or the mutants would be too coarse
        assert {BUNDLE, LATER} & seen


def test_nothing_was_executed_and_nothing_hung(opened: list[dict[str, Any]]) -> None:
    assert not [line for line in opened if line["events"]]
    assert max(line["seconds"] for line in opened) < SLOWEST


def the_clip(bundle: Bundle) -> bytes:
    """One step under all conditions, so that every graph but `encode` runs."""
    frames, size = bundle.manifest.frames, bundle.manifest.size
    ramp = np.linspace(0, 1, size * size, dtype=np.float32).reshape(size, size)
    conditions = Conditions(
        text="An ECHO with 4-chamber view.",
        ef=55.0,
        image=ramp,
        sketch=ramp,
        mask=np.full((frames, size, size), 1, np.uint8),
        skeleton=ramp,
        flow=np.ones((2, size, size), np.float32),
        frames=frames,
        size=size,
    )
    clip = Generator.open(bundle, engine="onnxruntime")(
        conditions, steps=1, seed=3, sampler="dpmpp_2m"
    )
    assert clip.frames.shape == (frames, size, size)
    assert clip.frames.dtype == np.uint8
    return clip.frames.tobytes()


def open_one(folder: Path, reference: tuple[float, bytes]) -> tuple[str, str]:
    """Outcome and message of one mutant; reference: the sound bundle's shared_start and clip."""
    stage = BUNDLE
    try:
        bundle = Bundle.open(folder)
        bundle.verify()
        stage = LATER
        if the_clip(bundle) == reference[1]:
            return SAME, ""
        return (ANOTHER if bundle.manifest.shared_start == reference[0] else START), ""
    except HeartBeatError as error:
        return stage, str(error)[:300]
    except BaseException as error:
        return "raw error", f"{type(error).__name__}: {error}"[:300].replace("\n", " ")


def main(source: Path, out: Path) -> None:
    """Makes and opens all mutants under limits; one line of JSON each, written as they come."""
    sound = Bundle.open(source)
    reference = sound.manifest.shared_start, the_clip(sound)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + HEADROOM, used + HEADROOM))
    events: list[str] = []
    watching = False
    sys.addaudithook(
        lambda event, _: events.append(event) if watching and event in FORBIDDEN else None
    )
    order = [family for family, (count, _) in COUNTS.items() for _ in range(count)]
    random.Random(0).shuffle(order)  # so that a leak of one family cannot hide in its turn
    with (out / "outcomes.jsonl").open("w", buffering=1) as log:
        for number, family in enumerate(order):
            folder = out / "mutant"
            shutil.copytree(source, folder, copy_function=os.link)
            home = onnx_mutants if hasattr(onnx_mutants, family) else bundle_mutants
            getattr(home, family)(folder, np.random.default_rng(number))
            start, watching = time.process_time(), True
            outcome, message = open_one(folder, reference)
            watching = False
            line = {"number": number, "family": family, "outcome": outcome, "message": message}
            seconds = time.process_time() - start
            log.write(json.dumps({**line, "seconds": seconds, "events": events}) + "\n")
            events.clear()
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
