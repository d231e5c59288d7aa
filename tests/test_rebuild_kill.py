"""Rebuilds are killed at random moments, and twenty run at once: what is opened is always whole.

As a script (`test_rebuild_kill.py FOLDER KILLS`) this file is the victim: torch is imported once
and every rebuild is a fork of it. HEARTBEAT_KILLS=200 asks for more kills than the default.
"""

import collections
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heartbeat_export import store
from heartbeat_export.rebuild import rebuild
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.models.heartbeat import HeartBeat
from heartbeat_fast.text import Tokenizer

KILLS, TOGETHER = int(os.environ.get("HEARTBEAT_KILLS", "40")), 20


def forked(work: Callable[[], Any]) -> int:
    """The process id of a fork that does the work, silently; its exit status is 1 on any error."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        work()
        code = 0
    finally:
        os._exit(code)


def version(folder: Path) -> str:
    """The weights of the version that is there, every file of it hashed."""
    bundle = Bundle.open(folder)
    bundle.verify()
    return bundle.manifest.fingerprints["weights"]


def one_life(folder: Path, checkpoint: Path, span: float, dice: random.Random) -> dict[str, Any]:
    """A rebuild that is killed; half of them once it began to write, which is when it matters."""
    files = {path.name for path in folder.iterdir()}
    child = forked(lambda: rebuild(folder, checkpoint))
    if dice.random() < 0.5:
        deadline = time.monotonic() + 20
        while {p.name for p in folder.iterdir()} <= files and time.monotonic() < deadline:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
        time.sleep(dice.uniform(0, 0.2 * span) * dice.random())
    else:
        time.sleep(dice.uniform(0, 1.1 * span))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    here = {path.name for path in folder.iterdir()}
    named = {spec.file for spec in store.specs(Bundle.open(folder).manifest)}
    return {
        "killed": os.WIFSIGNALED(status),
        "left": len(here - files - named),
        "unfinished": sum(name.endswith(".tmp") for name in here),
        "weights": version(folder),
    }


def together(folder: Path, checkpoints: list[Path]) -> dict[str, Any]:
    """Many rebuilds at once, to one checkpoint or the other, and a reader that never stops."""
    children = {
        forked(lambda c=checkpoints[i % 2]: rebuild(folder, c))  # type: ignore[misc]
        for i in range(TOGETHER)
    }
    seen, codes = collections.Counter[str](), []
    while children:
        seen[version(folder)] += 1
        for child in list(children):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                children.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
    return {"seen": seen, "codes": codes}


def main(folder: Path, kills: int) -> None:
    dice = random.Random(5)
    bundle, checkpoints = folder / "bundle", [folder / "a", folder / "b"]
    start = time.monotonic()
    os.waitpid(forked(lambda: rebuild(bundle, checkpoints[1])), 0)
    span = time.monotonic() - start
    weights = [version(bundle)]
    os.waitpid(forked(lambda: rebuild(bundle, checkpoints[0])), 0)
    weights.insert(0, version(bundle))
    lives = []
    for _ in range(kills):
        wanted = checkpoints[weights.index(version(bundle)) ^ 1]  # always to the other version
        lives.append(one_life(bundle, wanted, span, dice))
        if not lives[-1]["killed"]:  # it was quicker than the one that was timed: aim earlier
            span *= 0.85
    both = together(bundle, checkpoints)
    rebuild(bundle, checkpoints[0])
    after = sorted(path.name for path in bundle.iterdir())
    print(json.dumps({"weights": weights, "lives": lives, "together": both, "after": after}))


@pytest.fixture
def folder(
    nano_model: HeartBeat, nano_tokenizer: Tokenizer, nano_bundle: Bundle, tmp_path: Path
) -> Path:
    """A bundle, and the model folders of two versions of it."""
    shutil.copytree(nano_bundle.path, tmp_path / "bundle")
    other = copy.deepcopy(nano_model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.startswith(("denoiser.time_embedding", "codec.decoder")):
                parameter.mul_(1.03)
    for name, model in (("a", nano_model), ("b", other)):
        model.save_pretrained(tmp_path / name)
        nano_tokenizer.save(tmp_path / name / "tokenizer.json")
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_and_crowds_leave_one_version_whole(folder: Path) -> None:
    command = [sys.executable, __file__, str(folder), str(KILLS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    a, b = found["weights"]
    assert a != b
    lives = found["lives"]
    assert len(lives) == KILLS
    assert {life["weights"] for life in lives} == {a, b}  # never another, never mixed
    killed = [life for life in lives if life["killed"]]
    assert len(killed) > KILLS / 2
    assert any(life["left"] for life in killed), "kills must land between writing and switching"
    assert set(found["together"]["seen"]) <= {a, b}
    assert found["together"]["codes"] == [0] * TOGETHER
    # What the killed left behind is swept.
    assert not [name for name in found["after"] if name.endswith(".tmp")]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
