"""Steps between shown frames: over a loop's joint and over a change, beside those within a clip."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from heartbeat_fast.controls import Settings
from heartbeat_fast.generator import Generator
from heartbeat_fast.playback import Frame, Loop, Player, step, whole_beat
from heartbeat_fast.stream import Session

RATE, HEART_RATE = 25, 70.0
BEFORE = 2 * RATE  # frames shown before a change and after it
FADE = 0.2


@dataclass(frozen=True)
class Change:
    """What is changed: an anatomy's EF, percent."""

    before: float = 60.0
    after: float = 35.0


def run(generator: Generator, anatomies: int, settings: Settings) -> list[dict[str, Any]]:
    """One row an anatomy: largest steps in mean grey levels within, over joints, over a change."""
    return [_row(generator, 11 + k, settings, Change()) for k in range(anatomies)]


def _row(generator: Generator, seed: int, settings: Settings, change: Change) -> dict[str, Any]:
    session = Session(generator, settings, anatomy=seed, ef=change.before, heart_rate=HEART_RATE)
    loops = []
    for ef in (change.before, change.after):
        session.set(ef=ef)
        frames = session.next().frames
        loops.append(Loop(frames, whole_beat(frames), session.wish.version))
    at = BEFORE + 3 * (seed % 7)  # another phase each time
    shown = _shown(loops, at)
    steps = [step(a.pixels, b.pixels) for a, b in pairwise(shown)]
    fading = range(at - 1, at + round(FADE * RATE) + 1)
    still = [i for i in range(len(steps)) if i not in fading]
    joints = [i for i in still if shown[i + 1].phase < shown[i].phase]
    return {
        "anatomy": seed,
        "within": max(steps[i] for i in still if i not in joints),
        "joint": max(steps[i] for i in joints),
        "change": max(steps[i] for i in fading),
        "apart": max(step(a, b) for a, b in zip(loops[0].frames, loops[1].frames, strict=False)),
    }


def _shown(loops: list[Loop], at: int) -> list[Frame]:
    player = Player(heart_rate=HEART_RATE, fade=FADE)
    shown = []
    for t in range(at + BEFORE):
        if t in (0, at):
            player.show(loops[t == at], t / RATE)
        shown.append(player.frame(t / RATE, t / RATE))
    return shown


def line(rows: list[dict[str, Any]]) -> str:
    """The ranges over all anatomies, in words."""
    parts = []
    for name in ("within", "joint", "change"):
        values = [row[name] for row in rows]
        parts.append(f"{name} {min(values):.1f} to {max(values):.1f}")
    return f"largest step between shown frames, grey levels: {', '.join(parts)}"
