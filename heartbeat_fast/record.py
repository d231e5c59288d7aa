"""Record: one real or simulated clip with what is known about it, whatever file it came from."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heartbeat_fast import extract
from heartbeat_fast.conditions import FRAMES, NAMES, NUM_LABELS, SIZE, Conditions, check_names
from heartbeat_fast.errors import RecordError

Float = NDArray[np.float32]
LONGEST = 64  # frames; 16 picked from more would skip over whole phases of the beat
VIEWS = {"A2C": "2-chamber", "A4C": "4-chamber"}


@dataclass(frozen=True, eq=False)
class Record:
    """A clip and its annotations. F frames, H rows, W columns.

    Args:
        frames: grey (F,H,W) uint8.
        labels: (F,H,W) uint8, 0 background, 1 LV cavity, 2 myocardium, 3 left atrium, or None.
        spacing_mm: millimetres per pixel along (rows, columns).
        fps: frames per second.
        view: "A2C", "A4C" or "unknown".
        ef: ejection fraction in percent, or None.
        patient, source: where the clip comes from; splits go by patient.
        skeleton: exact mitral-valve line (F,H,W) in [0,1]; None where it must be extracted.
        flow: exact motion (F,2,H,W), pixels per frame (columns, rows); None likewise.

    Raises:
        RecordError: names the field, what came, and what is wanted.
    """

    frames: NDArray[np.uint8]
    labels: NDArray[np.uint8] | None = None
    spacing_mm: tuple[float, float] = (1.0, 1.0)
    fps: float = 30.0
    view: str = "unknown"
    ef: float | None = None
    patient: str = ""
    source: str = ""
    skeleton: Float | None = None
    flow: Float | None = None

    def __post_init__(self) -> None:
        shape, dtype = self.frames.shape, self.frames.dtype
        if len(shape) != 3 or dtype != np.uint8 or 0 in shape:
            raise RecordError(f"frames: {dtype} {shape} came; wanted grey uint8 (F,H,W)")
        for name, wanted in (
            ("labels", shape),
            ("skeleton", shape),
            ("flow", (shape[0], 2, *shape[1:])),
        ):
            array = getattr(self, name)
            if array is not None and array.shape != wanted:
                raise RecordError(f"{name}: shape {array.shape} came; wanted {wanted} as frames")
        if self.labels is not None and (
            self.labels.dtype != np.uint8 or self.labels.max() >= NUM_LABELS
        ):
            raise RecordError(
                f"labels: {self.labels.dtype} up to {self.labels.max()} came; wanted uint8 0 to 3"
            )
        for name, number in (
            ("fps", self.fps),
            ("spacing_mm", self.spacing_mm[0]),
            ("spacing_mm", self.spacing_mm[1]),
        ):
            if not 0 < number < np.inf:
                raise RecordError(f"{name}: {number} came; wanted a positive number")
        if self.view not in (*VIEWS, "unknown"):
            raise RecordError(f"view: {self.view!r} came; wanted A2C, A4C or unknown")

    @property
    def text(self) -> str:
        """The prompt for this view, in the paper's wording."""
        view = VIEWS.get(self.view)
        return f"An ECHO with {view} view." if view else "An ECHO."

    def window(self, start: int, stop: int) -> "Record":
        """Frames start to stop (excluded), as one heart beat out of a long clip.

        Raises:
            RecordError: the range is empty or leaves the clip.
        """
        if not 0 <= start < stop <= len(self.frames):
            raise RecordError(f"window: {start}:{stop} came; wanted within 0:{len(self.frames)}")
        return self._picked(np.arange(start, stop))

    def standardised(self, frames: int = FRAMES, size: int = SIZE) -> "Record":
        """The clip as the model takes it: (frames, size, size).

        Space: centred zero-padding to a square, area resizing (labels nearest), spacing follows.
        Time: frames picked by linspace and rounding, fps follows. Flow holds between neighbours
        only, so it is dropped when frames are skipped; `conditions` then estimates it anew.

        Raises:
            RecordError: too few or too many frames to stand for one beat.
        """
        F = len(self.frames)
        if F != 1 and not frames <= 2 * F <= 2 * max(LONGEST, frames):
            raise RecordError(
                f"frames: {F} came; wanted 1 (a still) or {(frames + 1) // 2} to "
                f"{max(LONGEST, frames)}, one beat: cut it out with Record.window(start, stop)"
            )
        picked = np.linspace(0, F - 1, frames).round().astype(int)
        clip = self if frames == F else self._picked(picked, fps=self.fps * _ratio(frames, F))
        return clip._resized(size)

    def conditions(self, names: Iterable[str] | None = None) -> Conditions:
        """The conditions this clip gives: exact arrays where the record has them, else extracted.

        Args:
            names: which ones, any of conditions.NAMES; None for all this clip can give.

        Raises:
            ConditionError: a name is unknown, or this clip cannot give it.
            RecordError: the frames are not square (use `standardised` first).
        """
        F, H, W = self.frames.shape
        if H != W:
            raise RecordError(f"frames: {H} x {W} came; wanted a square: use Record.standardised")
        wanted = NAMES if names is None else check_names(names)
        first = self.frames[0].astype(np.float32) / 255
        makers = {
            "text": lambda: self.text,
            "ef": lambda: self.ef,
            "image": lambda: first,
            "sketch": lambda: extract.sketch(first),
            "mask": lambda: self.labels,
            "skeleton": self._skeleton,
            "flow": lambda: extract.flow(self.frames) if self.flow is None else self.flow,
        }
        found = {name: makers[name]() for name in wanted}
        given = Conditions(**found, frames=F, size=H)
        return given if names is None else given.only(wanted)

    def _skeleton(self) -> Float | None:
        skeleton = self.skeleton
        if skeleton is None and self.labels is not None:
            skeleton = extract.skeleton_from_labels(self.labels)
        return skeleton if skeleton is not None and skeleton.any() else None

    def _picked(self, index: NDArray[np.int_], fps: float | None = None) -> "Record":
        flow = None
        if self.flow is not None and (np.diff(index) == 1).all():
            flow = self.flow[index].copy()
            flow[-1] = 0
        return replace(
            self,
            frames=self.frames[index],
            labels=None if self.labels is None else self.labels[index],
            skeleton=None if self.skeleton is None else self.skeleton[index],
            flow=flow,
            fps=fps or self.fps,
        )

    def _resized(self, size: int) -> "Record":
        H, W = self.frames.shape[1:]
        if H == W == size:
            return self
        scale = size / max(H, W)
        labels, skeleton, flow = self.labels, self.skeleton, self.flow
        return replace(
            self,
            frames=_square(self.frames, size),
            labels=None if labels is None else _square(labels, size, Image.Resampling.NEAREST),
            skeleton=None if skeleton is None else _square(skeleton, size),
            flow=None
            if flow is None
            else _square(flow.reshape(-1, H, W), size).reshape(-1, 2, size, size) * scale,
            spacing_mm=(self.spacing_mm[0] / scale, self.spacing_mm[1] / scale),
        )


def view_in(description: str) -> str:
    """The view a file name or a description speaks of: "A2C", "A4C", else "unknown"."""
    found = re.search(r"(2|4|two|four)[-_ ]?(ch|c\b)", description.lower())
    return {"2": "A2C", "t": "A2C", "4": "A4C", "f": "A4C"}[found[1][0]] if found else "unknown"


def _ratio(frames: int, came: int) -> float:
    """fps after over fps before: the clip keeps its duration, from first frame to last."""
    return (frames - 1) / (came - 1) if came > 1 and frames > 1 else 1.0


def _square(stack: NDArray[Any], size: int, filter: Image.Resampling | None = None) -> NDArray[Any]:
    """(N,H,W) padded with zeros to a centred square and resized to (N,size,size)."""
    H, W = stack.shape[1:]
    side = max(H, W)
    top, left = (side - H) // 2, (side - W) // 2
    padded = np.pad(stack, ((0, 0), (top, side - H - top), (left, side - W - left)))
    # BOX is area averaging; enlarging by area would repeat pixels.
    smooth = Image.Resampling.BOX if size <= side else Image.Resampling.BILINEAR
    return np.stack(
        [np.asarray(Image.fromarray(a).resize((size, size), filter or smooth)) for a in padded]
    )
