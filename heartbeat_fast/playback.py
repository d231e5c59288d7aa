"""A clip played by cardiac phase: it loops without a seam, at any heart rate, at any frame rate.

A clip shows either a whole beat, ED to ED, or its first part, ED to ES. The first wraps; the second
is played forth in systole and back in diastole, as fast as a ventricle empties and fills. So a
clip that replaces another joins it at the same phase, and heart rate is a matter of playing.
Legend: F frames, H W pixels; phase 0 is ED, 1 the next ED.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import contraction_at, systole
from heartbeat_fast.conditions import Conditions

LV = 1
FIRST = 0.1  # share of the new clip in a fade's first frame: a change shows at once
JOIN = 3  # frames over which what keeps a beat from closing is faded out

Image = NDArray[np.uint8]


def step(a: Image, b: Image) -> float:
    """Mean absolute difference of two frames in grey levels."""
    return float(np.abs(a.astype(np.int16) - b).mean())


def whole_beat(frames: Image, mask: Image | None = None) -> bool:
    """Whether a clip (F,H,W) ends where it began, rather than at ES.

    By the area of the ventricle where a mask (F,H,W) tells it, else by the frames: a whole beat's
    last frame is nearer to its first one than half as far as the clip goes.
    """
    if len(frames) < 3:
        return False
    if mask is not None:
        area = (mask == LV).sum((1, 2)).astype(float)
        if (swing := np.abs(area - area[0]).max()) > 0.05 * area[0]:
            return bool(abs(area[-1] - area[0]) < 0.5 * swing)
    away = [step(frame, frames[0]) for frame in frames[1:]]
    return away[-1] < 0.5 * max(away)


class Loop:
    """One clip as a function of phase.

    Args:
        frames: (F,H,W).  whole: whether they cover a beat; else ED to ES.
        version: of the conditions it was made from.
        created: when it was ready, seconds since 1970.
    """

    def __init__(self, frames: Image, whole: bool, version: int = 0, created: float = 0.0) -> None:
        self.version, self.created, self.whole = version, created, whole
        self.frames = _closed(frames) if whole else frames

    @classmethod
    def of(
        cls, frames: Image, conditions: Conditions, version: int = 0, created: float = 0.0
    ) -> "Loop":
        """Finds out by itself what the clip covers."""
        return cls(frames, whole_beat(frames, conditions.mask), version, created)

    def index(self, phase: float, heart_rate: float) -> int:
        """The frame shown at a phase."""
        count = len(self.frames)
        if self.whole:
            return int(phase * count) % count
        if phase < (end := systole(heart_rate)):
            share = phase / end
        else:  # where on the way to ES the ventricle is as full as now
            c = float(contraction_at(np.array([phase]), heart_rate)[0])
            share = math.acos(1 - 2 * min(max(c, 0), 1)) / math.pi
        return min(round(share * (count - 1)), count - 1)

    def seam(self) -> tuple[float, float]:
        """The step over the loop's joint, and the largest within: mean grey levels a frame.

        A clip that is played back and forth joins itself where it turns: no step at all.
        """
        within = max(step(a, b) for a, b in pairwise(self.frames))
        return (step(self.frames[-1], self.frames[0]) if self.whole else 0.0), within


def _closed(frames: Image) -> Image:
    """A whole beat without its last frame, which is the first of the next beat.

    Where it is not the same, the frames before it are faded towards the first one.
    """
    steps = [step(a, b) for a, b in pairwise(frames)]
    if step(frames[-1], frames[0]) <= np.median(steps):
        return frames[:-1]
    out = frames[:-1].copy()
    for back in range(1, min(JOIN, len(out) - 1) + 1):
        share = 1 - back / (JOIN + 1)
        out[-back] = _mixed(out[-back], frames[0], share)
    return out


def _mixed(a: Image, b: Image, share: float) -> Image:
    return np.asarray(a + (b.astype(np.float32) - a) * share + 0.5, np.uint8)


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame as it is shown.

    Args:
        pixels: (H,W) uint8; a view of the clip's own memory unless two clips are being faded.
        time: when it was composed, seconds since 1970.
        phase: 0 at ED, up to 1.
        version: of the conditions behind it; the newer ones' from the first faded frame on.
        number: counts the frames of this player.
    """

    pixels: Image
    time: float
    phase: float
    version: int
    number: int


@dataclass
class Player:
    """Shows loops one after another on one cardiac clock.

    Args:
        heart_rate: beats per minute; may be changed at any time.
        fade: seconds over which a new clip replaces the one shown.
    """

    heart_rate: float = 60.0
    fade: float = 0.2
    phase: float = 0.0
    loop: Loop | None = None
    _from: Loop | None = None
    _since: float = 0.0
    _last: float | None = None
    _number: int = field(default=0)

    def show(self, loop: Loop, now: float) -> None:
        """Replaces the clip that is shown, at the present phase, fading from the old one."""
        self._from, self.loop, self._since = self.loop, loop, now

    def fading(self, now: float) -> bool:
        """Whether two clips are shown at `now`: a third one would make the picture jump."""
        return self._from is not None and now - self._since < self.fade

    def turned(self, now: float) -> bool:
        """Whether the next frame at `now` begins another beat."""
        return self._last is None or self._at(now) >= 1

    def frame(self, now: float, time: float) -> Frame:
        """The frame at `now`, seconds of a steady clock; `time` is the calendar's.

        `show` must have been called.
        """
        assert self.loop is not None
        self.phase = self._at(now) % 1
        self._last = now
        pixels = self.loop.frames[self.loop.index(self.phase, self.heart_rate)]
        if self._from is not None and self.fading(now):
            share = (now - self._since) / self.fade
            old = self._from.frames[self._from.index(self.phase, self.heart_rate)]
            pixels = _mixed(old, pixels, max(share, FIRST))
        else:
            self._from = None
        self._number += 1
        return Frame(pixels, time, self.phase, self.loop.version, self._number)

    def _at(self, now: float) -> float:
        passed = 0.0 if self._last is None else max(now - self._last, 0.0)
        return self.phase + passed * self.heart_rate / 60
