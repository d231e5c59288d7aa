"""A long run of `heartbeat serve igtl`: is every frame in time, and does memory stand still?

Conditions change every two seconds; other clients are killed, stall, send noise and come back
throughout. What is late, old or growing is reported as measured, with intervals.
"""

import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from heartbeat_benchmarks import flicker
from heartbeat_benchmarks.fingerprint import fingerprint
from heartbeat_benchmarks.timing import summary
from heartbeat_fast.bundle import Bundle
from heartbeat_fast.controls import Settings
from heartbeat_fast.errors import EngineError
from heartbeat_fast.generator import Generator
from heartbeat_fast.serve.igtl import IgtlServer
from heartbeat_fast.stream import Session

WARM_UP = 0.2  # share of the run before memory is looked at
BLOCKS = 20
STUDENT = 2.101  # 97.5 % of t with BLOCKS − 2 degrees of freedom


@dataclass(frozen=True)
class Plan:
    """A soak. rate: frames/s. every: seconds from change to change. clients: blocking ones.

    bad: clients that are killed, stall and send noise. pyigtl: clients of that library.
    flicker: anatomies whose steps between frames are looked at first (flicker.py).
    """

    minutes: float = 10.0
    rate: float = 25.0
    every: float = 2.0
    clients: int = 1
    pyigtl: int = 1
    bad: int = 3
    engine: str = "auto"
    steps: int | None = None
    carry: float = 0.5
    flicker: int = 0


def run(path: Path | str | None, plan: Plan) -> dict[str, Any]:
    """Runs a plan; JSON values.

    Raises:
        EngineError: no first clip, or the clients' process failed.
    """
    bundle = Bundle.open(path)
    generator = Generator.open(bundle, plan.engine)
    settings = Settings(steps=plan.steps, carry=plan.carry)
    facts = fingerprint(bundle)
    steps = flicker.run(generator, plan.flicker, settings)
    with (
        Session(generator, settings, anatomy=7, ef=55, text="An ECHO.") as session,
        IgtlServer(session, port=0, rate=plan.rate) as server,
    ):
        session.frame()
        seconds = 60 * plan.minutes
        with _clients(server.port, seconds, plan) as clients:
            memory, sent = _steer(session, server, plan, clients)
            try:
                out, errors = clients.communicate(timeout=60)
            except subprocess.TimeoutExpired as error:
                clients.kill()
                raise EngineError("soak: clients did not end: the server hangs") from error
        if clients.returncode:
            raise EngineError(f"soak: clients failed: {errors.strip().splitlines()[-1]}")
        stats = session.stats
    seen = json.loads(out)
    return {
        "fingerprint": facts,
        "plan": asdict(plan),
        "engine": {"name": generator.engine.name, "precision": generator.engine.precision},
        "session": {
            "changes": sent,
            "clips": stats.clips,
            "cancelled": stats.cancelled,
            "faults": stats.faults,
            "missed_deadlines": stats.missed,
            "frames_due": round(seconds * plan.rate),
            "change_to_first_frame_s": summary(stats.latencies),
        },
        "blocking": [_client(one, plan.rate) for one in seen["blocking"]],
        "pyigtl": [_client(one, plan.rate) for one in seen["pyigtl"]],
        "deeds": seen["deeds"],
        "flicker": steps,
        "memory": slope(memory),
        "raw": {
            "latencies_s": [round(x, 4) for x in stats.latencies],
            "memory_mb": [[round(t, 1), round(m, 2)] for t, m in memory],
            "ages_ms": [round(x, 3) for x in seen["blocking"][0]["ages_ms"]],
        },
    }


def _clients(port: int, seconds: float, plan: Plan) -> "subprocess.Popen[str]":
    numbers = {"port": port, "blocking": plan.clients, "pyigtl": plan.pyigtl, "bad": plan.bad}
    options = [f"--{name}={value}" for name, value in (*numbers.items(), ("seconds", seconds))]
    return subprocess.Popen(
        [sys.executable, "-m", "heartbeat_benchmarks.soak_clients", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _steer(
    session: Session, server: IgtlServer, plan: Plan, clients: "subprocess.Popen[str]"
) -> tuple[list[tuple[float, float]], int]:
    """Changes conditions until the clients end; (seconds, MiB) every half second, and the count."""
    chance, process = random.Random(0), psutil.Process()
    start, due, memory, sent = time.monotonic(), 0.0, [], 0
    while clients.poll() is None:
        now = time.monotonic() - start
        if now >= due:
            change = {"ef": chance.uniform(25, 70)}
            change |= {"heart_rate": chance.uniform(50, 110)} if chance.random() < 0.3 else {}
            session.set(**change)
            due, sent = due + plan.every, sent + 1
        memory.append((now, process.memory_info().rss / 2**20))
        time.sleep(0.5)
        if now > 60 * plan.minutes + 30:  # its output is read once it ended
            break
    return memory, sent


def _client(seen: dict[str, Any], rate: float) -> dict[str, Any]:
    """Ages, and gaps between frames as they were composed, in ms."""
    gaps = np.diff(seen["stamps"]) * 1e3
    late = gaps > 1.5e3 / rate
    return {
        "age_ms": summary(seen["ages_ms"]),
        "gap_ms": summary(gaps.tolist()),
        "late_gaps": int(late.sum()),
    }


def slope(memory: list[tuple[float, float]]) -> dict[str, Any]:
    """Growth of memory in MiB a minute with its 95 % interval, after the warm-up.

    Neighbouring samples are alike, so the line is fitted through the means of BLOCKS stretches.
    """
    points = np.asarray(memory, float)
    points = points[points[:, 0] >= WARM_UP * points[-1, 0]]
    found: dict[str, Any] = {"first_mb": memory[0][1], "last_mb": memory[-1][1]}
    if len(points) < 2 * BLOCKS:
        return found | {"slope_mb_min": None, "interval": None}
    x, y = np.array([block.mean(0) for block in np.array_split(points, BLOCKS)]).T
    x = (x - x.mean()) / 60
    rise = float((x * y).sum() / (x * x).sum())
    rest = y - y.mean() - rise * x
    error = float(np.sqrt((rest**2).sum() / (BLOCKS - 2) / (x * x).sum()))
    return found | {
        "slope_mb_min": rise,
        "interval": [rise - STUDENT * error, rise + STUDENT * error],
    }


def lines(result: dict[str, Any]) -> list[str]:
    """What a person reads."""
    session, memory = result["session"], result["memory"]
    said = [
        f"{result['engine']['name']} {result['engine']['precision']}: "
        f"{session['missed_deadlines']} of {session['frames_due']} frames missed their deadline; "
        f"{session['clips']} clips for {session['changes']} changes, {session['faults']} faults",
        f"change to first frame, s: {_said(session['change_to_first_frame_s'])}",
    ]
    for kind in ("blocking", "pyigtl"):
        for one in result[kind]:
            said.append(f"{kind} client: age, ms: {_said(one['age_ms'])}")
            said.append(f"{kind} client: gap, ms: {_said(one['gap_ms'])}; late {one['late_gaps']}")
    said.append(f"meanwhile: {', '.join(f'{n} {deed}' for deed, n in result['deeds'].items())}")
    if result["flicker"]:
        said.append(flicker.line(result["flicker"]))
    interval = memory["interval"]
    said.append(
        f"memory: {memory['first_mb']:.0f} to {memory['last_mb']:.0f} MiB"
        + (f"; {memory['slope_mb_min']:+.2f} MiB a minute" if interval else "; too short a run")
        + (f" (95 %: {interval[0]:+.2f} to {interval[1]:+.2f})" if interval else "")
    )
    return said


def _said(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in found.items()) or "none"
