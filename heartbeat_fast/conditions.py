"""The seven conditions of a clip (HeartBeat, MICCAI 2024, and LVEF, ours): shapes and checks.

Legend: F frames, H rows, W columns (H = W = size). Any subset may be present; None means absent.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.errors import ConditionError

FRAMES = 16
SIZE = 256
LATENT = SIZE // 8
TOKENS = 77
NUM_LABELS = 4  # 0 background, 1 LV cavity, 2 myocardium, 3 left atrium
NAMES = ("text", "ef", "image", "sketch", "mask", "skeleton", "flow")
LOCAL = NAMES[3:]  # those that speak of pixels
MAX_CHARACTERS = 2000  # 77 tokens are far less; a bound before any work is done on the text

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of one clip, checked and brought to one form at construction.

    Args:
        text: the prompt, at most 77 tokens (counted by the bundle's tokenizer); "" is absent.
        ef: left-ventricular ejection fraction in percent, 0-100.
        image: image prior, (H,W), (H,W,3) or (3,H,W), uint8 or float in [0,1]. Kept grey (H,W).
        sketch: edge map, (H,W) in [0,1].
        mask: integer labels 0-3, (F,H,W) or (H,W), or one-hot (F,4,H,W). Kept as labels (F,H,W).
        skeleton: mitral-valve line, (F,H,W) or (H,W) in [0,1].
        flow: (F,2,H,W) or (2,H,W), pixels per frame, channel 0 along columns, 1 along rows, from
            frame t to t+1. The last frame has no next one: its flow is set to zero.
        frames, size: the clip's F, and its H = W in pixels.

    A single frame given for mask, skeleton or flow holds for the whole clip.

    Raises:
        ConditionError: names the field, what came, and what is wanted.
    """

    text: str | None = None
    ef: float | None = None
    image: NDArray[Any] | None = None
    sketch: NDArray[Any] | None = None
    mask: NDArray[Any] | None = None
    skeleton: NDArray[Any] | None = None
    flow: NDArray[Any] | None = None
    frames: int = FRAMES
    size: int = SIZE

    def __post_init__(self) -> None:
        for name in NAMES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _CHECKS[name](value, self.frames, self.size))

    @property
    def present(self) -> tuple[str, ...]:
        """The names that are given, in the order of NAMES."""
        return tuple(name for name in NAMES if getattr(self, name) is not None)

    def only(self, names: Iterable[str]) -> "Conditions":
        """The same clip with nothing but these conditions.

        Raises:
            ConditionError: a name is unknown, or was not given.
        """
        kept = check_names(names)
        if lacking := [name for name in kept if getattr(self, name) is None]:
            raise ConditionError(
                f"conditions: {', '.join(lacking)} asked for but not given; "
                f"given: {', '.join(self.present) or 'none'}"
            )
        dropped: dict[str, Any] = {name: None for name in NAMES if name not in kept}
        return replace(self, **dropped)

    def arrays(self) -> dict[str, Float]:
        """Everything but the text as the graphs take it: float32, batch 1, zeros where absent.

        Returns:
            ef (1,1) as a fraction, image (1,3,H,W), sketch (1,1,H,W), mask one-hot (1,F,4,H,W),
            skeleton (1,F,1,H,W), flow (1,F,2,H,W), present (1,7) of 0/1 in the order of NAMES.
        """
        F, S = self.frames, self.size
        shapes = {
            "ef": (1, 1),
            "image": (1, 3, S, S),
            "sketch": (1, 1, S, S),
            "mask": (1, F, NUM_LABELS, S, S),
            "skeleton": (1, F, 1, S, S),
            "flow": (1, F, 2, S, S),
        }
        out = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        values: dict[str, Any] = {name: getattr(self, name) for name in self.present}
        if "ef" in values:
            out["ef"][:] = values["ef"] / 100
        if "mask" in values:
            np.equal(values["mask"][:, None], _LABELS, out=out["mask"][0], casting="unsafe")
        if "skeleton" in values:
            out["skeleton"][0, :, 0] = values["skeleton"]
        for name in {"image", "sketch"} & values.keys():
            out[name][0] = values[name]
        if "flow" in values:  # its own array, 8 MB, not a copy: graphs only read
            out["flow"] = values["flow"][None]
        out["present"] = np.array([[name in values for name in NAMES]], np.float32)
        return out


def check_names(names: Iterable[str]) -> tuple[str, ...]:
    """Condition names in the order of NAMES.

    Raises:
        ConditionError: one of them is not a condition.
    """
    wanted = {names} if isinstance(names, str) else set(names)
    if unknown := sorted(wanted - set(NAMES)):
        raise ConditionError(f"conditions: {', '.join(unknown)} unknown; wanted any of {_ALL}")
    return tuple(name for name in NAMES if name in wanted)


def _text(value: Any, frames: int, size: int) -> str | None:
    if not isinstance(value, str):
        raise ConditionError(f"text: a {type(value).__name__} came; wanted a string")
    if len(value) > MAX_CHARACTERS:
        raise ConditionError(
            f"text: {len(value)} characters came; wanted at most {TOKENS} tokens, "
            f"never more than {MAX_CHARACTERS} characters"
        )
    return value if value.strip() else None


def _ef(value: Any, frames: int, size: int) -> float:
    try:
        percent = float(value)
    except (TypeError, ValueError) as error:
        raise ConditionError(f"ef: {value!r} came; wanted percent, 0 to 100") from error
    if not 0 <= percent <= 100:  # also false for NaN
        raise ConditionError(f"ef: {percent:g} came; wanted percent, 0 to 100")
    return percent


def _image(value: Any, frames: int, size: int) -> Float:
    image = _numbers("image", value)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 3:
        _check_size("image", image.shape[:2], size)
        image = _unit("image", image) @ np.array([0.299, 0.587, 0.114], np.float32)  # BT.601
    if image.ndim != 2:
        raise ConditionError(
            f"image: shape {image.shape} came; wanted ({size},{size}), "
            f"({size},{size},3) or (3,{size},{size})"
        )
    _check_size("image", image.shape, size)
    return _unit("image", image)


def _sketch(value: Any, frames: int, size: int) -> Float:
    sketch = _numbers("sketch", value)
    if sketch.ndim != 2:
        raise ConditionError(
            f"sketch: shape {sketch.shape} came; wanted ({size},{size}), one image"
        )
    _check_size("sketch", sketch.shape, size)
    return _unit("sketch", sketch)


def _mask(value: Any, frames: int, size: int) -> NDArray[np.uint8]:
    mask = _numbers("mask", value)
    if mask.ndim == 4:
        mask = _labels_of_one_hot(mask, frames, size)
    mask = _sequence("mask", mask, frames, size, ())
    if mask.min() < 0 or mask.max() >= NUM_LABELS or (mask != np.floor(mask)).any():
        odd = np.unique(mask[(mask < 0) | (mask >= NUM_LABELS) | (mask != np.floor(mask))])
        raise ConditionError(
            f"mask: values {', '.join(f'{v:g}' for v in odd[:4])} came; wanted labels 0 background,"
            " 1 LV cavity, 2 myocardium, 3 left atrium"
        )
    if empty := np.flatnonzero(~mask.any((1, 2))).tolist():
        where = "every frame" if len(empty) == len(mask) else f"frame {empty[0]}"
        raise ConditionError(
            f"mask: {where} came all zero (only background); wanted labels in each frame, "
            "or no mask at all"
        )
    return _whole_clip(mask.astype(np.uint8), frames)


def _labels_of_one_hot(mask: NDArray[Any], frames: int, size: int) -> NDArray[Any]:
    if mask.shape[1] != NUM_LABELS:
        raise ConditionError(
            f"mask: shape {mask.shape} came; wanted labels ({frames},{size},{size}) "
            f"or one-hot ({frames},{NUM_LABELS},{size},{size})"
        )
    _sequence("mask", mask, frames, size, (NUM_LABELS,))
    if not (np.isin(mask, (0, 1)).all() and (mask.sum(1) == 1).all()):
        raise ConditionError("mask: soft or overlapping classes came; wanted one-hot 0/1")
    return mask.argmax(1)


def _skeleton(value: Any, frames: int, size: int) -> Float:
    skeleton = _sequence("skeleton", _numbers("skeleton", value), frames, size, ())
    return _whole_clip(_unit("skeleton", skeleton), frames)


def _flow(value: Any, frames: int, size: int) -> Float:
    flow = _sequence("flow", _numbers("flow", value), frames, size, (2,))
    if (longest := float(np.abs(flow).max())) >= size:
        raise ConditionError(
            f"flow: {longest:g} pixels a frame came; wanted less than the image's {size}"
        )
    flow = _whole_clip(flow.astype(np.float32), frames)
    flow[-1] = 0
    return flow


def _numbers(name: str, value: Any) -> NDArray[Any]:
    """A real, finite, non-empty array; floats are checked for NaN before anything else."""
    array = np.asarray(value)
    if array.dtype.kind not in "buif" or array.size == 0:
        raise ConditionError(f"{name}: {array.dtype} of shape {array.shape} came; wanted numbers")
    if array.dtype.kind == "f" and (bad := int(array.size - np.isfinite(array).sum())):
        raise ConditionError(f"{name}: {bad} NaN or infinite values came; wanted finite numbers")
    return array


def _unit(name: str, array: NDArray[Any]) -> Float:
    """A float32 copy in [0,1]; uint8 is divided by 255."""
    if array.dtype == np.uint8 and name == "image":
        return array.astype(np.float32) / np.float32(255)
    low, high = float(array.min()), float(array.max())
    if low < -1e-5 or high > 1 + 1e-5:  # resampling leaves rounding errors of this order
        raise ConditionError(f"{name}: values {low:g} to {high:g} came; wanted 0 to 1")
    unit: Float = np.clip(array.astype(np.float32), 0, 1)
    return unit


def _check_size(name: str, shape: tuple[int, ...], size: int) -> None:
    if shape != (size, size):
        raise ConditionError(
            f"{name}: {shape[0]} rows x {shape[1]} columns came; wanted {size} x {size}: "
            "use Record.standardised or `heartbeat extract`"
        )


def _sequence(
    name: str, array: NDArray[Any], frames: int, size: int, channels: tuple[int, ...]
) -> NDArray[Any]:
    """The array as (1 or F, *channels, H, W)."""
    if array.ndim == len(channels) + 2:
        array = array[None]
    if array.ndim != len(channels) + 3 or array.shape[1:-2] != channels:
        wanted = ",".join(map(str, (frames, *channels, size, size)))
        raise ConditionError(f"{name}: shape {array.shape} came; wanted ({wanted}) or one frame")
    _check_size(name, array.shape[-2:], size)
    if array.shape[0] not in (1, frames):
        raise ConditionError(
            f"{name}: {array.shape[0]} frames came; wanted 1 or {frames}: resample with "
            f"Record.standardised(frames={frames}) or `heartbeat extract`"
        )
    return array


def _whole_clip(array: NDArray[Any], frames: int) -> NDArray[Any]:
    return np.repeat(array, frames, axis=0) if array.shape[0] != frames else array


_ALL = ", ".join(NAMES)
_LABELS = np.arange(NUM_LABELS, dtype=np.uint8)[:, None, None]
_CHECKS = {
    "text": _text,
    "ef": _ef,
    "image": _image,
    "sketch": _sketch,
    "mask": _mask,
    "skeleton": _skeleton,
    "flow": _flow,
}
assert tuple(f.name for f in fields(Conditions))[: len(NAMES)] == NAMES
