"""What a person sets on the page, and the conditions of a clip that follow from it.

The anatomy model (heart.py) gives labels, valve and motion for an EF and a heart rate; a painted
frame and a dragged valve change them. Legend: F frames, H = W = size.
"""

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import contraction, sample_anatomy, sway
from heartbeat_fast.conditions import NAMES, NUM_LABELS, Conditions, check_names
from heartbeat_fast.errors import ConditionError
from heartbeat_fast.heart import Motion, Shape, fetch, move
from heartbeat_fast.record import VIEWS

NEAREST = 0  # OpenCV's cv2.INTER_NEAREST
# A dragged valve takes its surroundings along, wholly within CORE of it, fading with σ SURROUND
# beyond; FARTHEST is the longest drag. Shares of the image's side; a drag below 1.6 σ stays one to
# one.
CORE, SURROUND, FARTHEST = 0.10, 0.14, 0.12
CARRIES = ("motion", "copy")
Labels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Paint:
    """Labels painted on one frame: labels (H,W), the frame's number, and how they are carried on.

    carry "motion": with the heart's motion, through the whole beat; "copy": to every frame alike.
    """

    labels: Labels
    frame: int
    carry: str = "motion"


@dataclass(frozen=True, eq=False)
class Controls:
    """The page's sliders and tools.

    Args:
        use: the conditions that count.
        view: A4C or A2C. heart: which anatomy. ef: percent. heart_rate: beats per minute.
        text: the prompt; "" is the view's own.
        valve: how far (x, y) the mitral valve is dragged, pixels.
        paint: None for the anatomy's own labels.
        image: grey (H,W) uint8, the image prior, from which the sketch is drawn too; or None.
        sampler, steps, guidance, seed: as Generator takes them.
    """

    use: tuple[str, ...] = ("text", "ef", "mask", "skeleton", "flow")
    view: str = "A4C"
    heart: int = 7
    ef: float = 55.0
    heart_rate: float = 70.0
    text: str = ""
    valve: tuple[float, float] = (0.0, 0.0)
    paint: Paint | None = None
    image: Labels | None = None
    sampler: str = "dpmpp_2m"
    steps: int = 10
    guidance: float = 1.0
    seed: int = 0

    def updated(self, message: Any, frames: int, size: int) -> "Controls":
        """These controls with a message's fields in place of their own.

        Args:
            message: a JSON object with any fields of Controls; paint is null or
                {"frame", "labels", "carry"}, image null or a string; labels and image are the
                base64 of H·W bytes, row by row.

        Raises:
            ConditionError: names the field, what came, and what is wanted.
        """
        if not isinstance(message, dict):
            raise ConditionError(f"message: {type(message).__name__} came; wanted a JSON object")
        if unknown := sorted(set(message) - set(_CHECKS)):
            known = ", ".join(_CHECKS)
            raise ConditionError(f"message: {unknown[0]!r:.40} unknown; wanted any of {known}")
        found = {name: _CHECKS[name](name, value, frames, size) for name, value in message.items()}
        return replace(self, **found)


@dataclass(frozen=True, eq=False)
class Scene:
    """What controls mean for one clip.

    conditions: those that count. labels (F,H,W), skeleton (F,H,W): of the heart, counting or not.
    spacing_mm of (rows, columns); fps at which the F frames are one beat.
    """

    conditions: Conditions
    labels: Labels
    skeleton: NDArray[np.float32]
    spacing_mm: tuple[float, float]
    fps: float

    def overlay(self) -> Labels:
        """(F,H,W) uint8 for the page: label in the low two bits, valve in the other six."""
        valve = np.rint(self.skeleton * 63).astype(np.uint8)
        return np.asarray(valve << 2 | self.labels)


def scene(controls: Controls, frames: int, size: int) -> Scene:
    """The conditions that the controls ask for, one whole beat from end-diastole on.

    Raises:
        ConditionError: image or sketch are to count, but no image was given.
        MissingDependency: OpenCV is not installed.
    """
    shape, motion = _heart(
        controls.heart, controls.view, controls.ef, controls.heart_rate, frames, size
    )
    labels, skeleton = motion.labels, motion.skeleton
    if controls.paint is not None:
        labels = carried(controls.paint, shape, motion)
    if any(controls.valve):
        labels, skeleton = dragged(labels, skeleton, controls.valve)
    values: dict[str, Any] = {
        "text": controls.text or f"An ECHO with {VIEWS[controls.view]} view.",
        "ef": controls.ef,
        "mask": labels,
        "skeleton": skeleton,
        "flow": motion.flow,
    }
    if controls.image is not None:
        values["image"] = controls.image
        if "sketch" in controls.use:
            from heartbeat_fast.extract import sketch

            values["sketch"] = sketch(controls.image)
    if lacking := [name for name in controls.use if name not in values]:
        raise ConditionError(f"{lacking[0]}: to count, but no image was given; wanted `image` too")
    used = {name: values[name] for name in controls.use}
    conditions = Conditions(**used, frames=frames, size=size)
    fps = (frames - 1) * controls.heart_rate / 60
    return Scene(conditions, labels, skeleton, (shape.spacing,) * 2, fps)


@lru_cache(maxsize=4)  # some 25 MB each at 256, and a slider passes many
def _heart(
    heart: int, view: str, ef: float, heart_rate: float, frames: int, size: int
) -> tuple[Shape, Motion]:
    anatomy = sample_anatomy(heart, view=view, ef=ef / 100, heart_rate=heart_rate, coverage=1.0)
    shape = Shape(anatomy, size)
    return shape, move(shape, frames)


def carried(paint: Paint, shape: Shape, motion: Motion) -> Labels:
    """Labels painted on one frame, on all frames: (F,H,W).

    With the motion, the pixel x of frame t shows what was painted where its material point
    X(x, t) was at the painted frame: X + c·U(X) + r.
    """
    F = len(motion.labels)
    if paint.carry == "copy":
        return np.repeat(paint.labels[None], F, 0)
    k = paint.frame
    c = float(contraction(shape.heart, F)[k])
    r = (sway(shape.heart, F)[k] / shape.spacing).astype(np.float32)
    U = np.ascontiguousarray(shape.U.transpose(1, 2, 0))
    there = (material + np.float32(c) * fetch(U, material) + r for material in motion.material)
    labels = np.stack([fetch(paint.labels, points, NEAREST) for points in there])
    labels[:, ~shape.inside] = 0
    labels[k] = paint.labels
    return labels


def dragged(
    labels: Labels, skeleton: NDArray[np.float32], by: tuple[float, float]
) -> tuple[Labels, NDArray[np.float32]]:
    """Labels and valve (F,H,W), with the valve's surroundings moved by (x, y) pixels."""
    size = labels.shape[-1]
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    new_labels, new_skeleton = labels.copy(), skeleton.copy()
    for t, line in enumerate(skeleton):
        weight = line.sum()
        if weight == 0:
            continue
        x, y = float((line * columns).sum() / weight), float((line * rows).sum() / weight)
        away = np.hypot(columns - x - by[0], rows - y - by[1]) - CORE * size
        share = np.exp(-(np.maximum(away, 0) ** 2) / (2 * (SURROUND * size) ** 2))
        source = np.stack([columns - by[0] * share, rows - by[1] * share], -1).astype(np.float32)
        new_labels[t] = fetch(labels[t], source, NEAREST)
        new_skeleton[t] = fetch(line, source)
    return new_labels, new_skeleton


def _number(low: float, high: float) -> Callable[..., float]:
    def check(name: str, value: Any, *_: int) -> float:
        sound = isinstance(value, int | float) and not isinstance(value, bool)
        if not (sound and low <= value <= high):
            raise ConditionError(f"{name}: {value!r:.40} came; wanted {low:g} to {high:g}")
        return float(value)

    return check


def _whole(low: int, high: int) -> Callable[..., int]:
    def check(name: str, value: Any, *_: int) -> int:
        sound = isinstance(value, int) and not isinstance(value, bool)
        if not (sound and low <= value <= high):
            raise ConditionError(
                f"{name}: {value!r:.40} came; wanted a whole number {low} to {high}"
            )
        return int(value)

    return check


def _one_of(known: tuple[str, ...]) -> Callable[..., str]:
    def check(name: str, value: Any, *_: int) -> str:
        if not (isinstance(value, str) and value in known):
            raise ConditionError(f"{name}: {value!r:.40} came; wanted one of {', '.join(known)}")
        return value

    return check


def _word(name: str, value: Any, *_: int) -> str:
    if not isinstance(value, str):
        raise ConditionError(f"{name}: {value!r:.40} came; wanted a string")
    return value


def _use(name: str, value: Any, *_: int) -> tuple[str, ...]:
    if not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise ConditionError(f"{name}: {value!r:.40} came; wanted a list of {', '.join(NAMES)}")
    return check_names(value)


def _valve(name: str, value: Any, frames: int, size: int) -> tuple[float, float]:
    if not (isinstance(value, list) and len(value) == 2):
        raise ConditionError(f"{name}: {value!r:.40} came; wanted [x, y] in pixels")
    x, y = (_number(-FARTHEST * size, FARTHEST * size)(name, part) for part in value)
    return x, y


def _paint(name: str, value: Any, frames: int, size: int) -> Paint | None:
    if value is None:
        return None
    if not (isinstance(value, dict) and value.keys() <= {"frame", "labels", "carry"}):
        raise ConditionError(f'{name}: {value!r:.40} came; wanted {{"frame", "labels", "carry"}}')
    labels = _pixels(f"{name}.labels", value.get("labels"), size)
    if labels.max() >= NUM_LABELS:
        raise ConditionError(f"{name}.labels: {labels.max()} came; wanted labels 0 to 3")
    frame = _whole(0, frames - 1)(f"{name}.frame", value.get("frame"))
    return Paint(labels, frame, _one_of(CARRIES)(f"{name}.carry", value.get("carry", "motion")))


def _image(name: str, value: Any, frames: int, size: int) -> Labels | None:
    return None if value is None else _pixels(name, value, size)


def _pixels(name: str, value: Any, size: int) -> Labels:
    try:
        data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except (binascii.Error, ValueError) as error:
        raise ConditionError(f"{name}: not base64 ({error})") from error
    if len(data) != size * size:
        raise ConditionError(f"{name}: {len(data)} bytes came; wanted {size} x {size}, in base64")
    return np.frombuffer(data, np.uint8).reshape(size, size)


_CHECKS: dict[str, Callable[..., Any]] = {
    "use": _use,
    "view": _one_of(tuple(VIEWS)),
    "heart": _whole(0, 2**31 - 1),
    "ef": _number(15, 80),
    "heart_rate": _number(40, 180),
    "text": _word,
    "valve": _valve,
    "paint": _paint,
    "image": _image,
    "sampler": _word,
    "steps": _whole(1, 1000),
    "guidance": _number(0, 20),
    "seed": _whole(0, 2**53),
}
assert set(_CHECKS) == {field.name for field in fields(Controls)}
