"""What comes over the wire and what goes back: JSON requests with arrays in base64, binary frames.

Nothing that comes is trusted: lengths are compared with what a header announces before an array is
made, and no pickle is read.
"""

import base64
import binascii
import io
import json
import math
import struct
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.clip import Clip
from heartbeat_fast.conditions import NAMES, Conditions
from heartbeat_fast.errors import ConditionError, FileError
from heartbeat_fast.serve.scene import Controls, scene

KINDS = {
    "video/mp4": ".mp4",
    "image/gif": ".gif",
    "image/webp": ".webp",
    "image/png": ".png",
    "application/dicom": ".dcm",
    "application/x-nifti": ".nii.gz",
    "application/x-npz": ".npz",
}
HOW = {
    "sampler": (str,),
    "steps": (int,),
    "guidance": (int, float),
    "seed": (int,),
    "temperature": (int, float),
    "fps": (int, float),
}
LONGEST_DEADLINE = 600.0  # seconds


@dataclass(frozen=True)
class ClipRequest:
    """A body of POST /v1/clips: conditions, or the page's controls; how; and the deadline."""

    conditions: dict[str, Any] = field(default_factory=dict)
    controls: Controls | None = None
    how: dict[str, Any] = field(default_factory=dict)
    mark: bool = True
    seconds: float = 120.0

    def prepared(self, frames: int, size: int) -> tuple[Conditions, dict[str, Any]]:
        """The conditions and Generator's other arguments.

        Raises:
            ConditionError: a condition is wrong.
        """
        if self.controls is None:
            return Conditions(**self.conditions, frames=frames, size=size), self.how
        made = scene(self.controls, frames, size)
        return made.conditions, {**arguments(self.controls, made.spacing_mm, made.fps), **self.how}


def arguments(controls: Controls, spacing_mm: tuple[float, float], fps: float) -> dict[str, Any]:
    """Generator's arguments beside the conditions."""
    return {
        "sampler": controls.sampler,
        "steps": controls.steps,
        "guidance": controls.guidance,
        "seed": controls.seed,
        "spacing_mm": spacing_mm,
        "fps": fps,
    }


def parsed(text: str | bytes) -> Any:
    """JSON, whatever its sender meant by it.

    Raises:
        ConditionError: not JSON, or nested without end.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConditionError(f"message: not JSON ({str(error)[:80]})") from error


def clip_request(body: bytes, frames: int, size: int) -> ClipRequest:
    """Reads a body of POST /v1/clips.

    Raises:
        ConditionError: names the field, what came, and what is wanted.
    """
    data = parsed(body)
    if not isinstance(data, dict):
        raise ConditionError(f"body: {type(data).__name__} came; wanted a JSON object")
    known = {"conditions", "controls", "mark", "deadline_s", "spacing_mm", *HOW}
    if unknown := sorted(set(data) - known):
        raise ConditionError(
            f"{unknown[0]!r:.40} unknown; wanted any of {', '.join(sorted(known))}"
        )
    if "conditions" in data and "controls" in data:
        raise ConditionError("conditions and controls came; wanted one of them")
    if not isinstance(mark := data.get("mark", True), bool):
        raise ConditionError(f"mark: {mark!r:.40} came; wanted true or false")
    controls = None
    if "controls" in data:
        controls = Controls().updated(data["controls"], frames, size)
    return ClipRequest(
        _conditions(data.get("conditions", {})), controls, _how(data), mark, _deadline(data)
    )


def _conditions(data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ConditionError(f"conditions: {type(data).__name__} came; wanted a JSON object")
    if unknown := sorted(set(data) - set(NAMES)):
        raise ConditionError(f"{unknown[0]!r:.40} unknown; wanted any of {', '.join(NAMES)}")
    given = {name: value for name, value in data.items() if value is not None}
    return {
        name: value if name in ("text", "ef") else array(name, value)
        for name, value in given.items()
    }


def _how(data: dict[str, Any]) -> dict[str, Any]:
    how: dict[str, Any] = {}
    for name, kinds in HOW.items():
        value = data.get(name)
        if value is not None:
            if type(value) not in kinds:
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ConditionError(f"{name}: {value!r:.40} came; wanted {wanted}")
            how[name] = value
    if (spacing := data.get("spacing_mm")) is not None:
        numbers = isinstance(spacing, list) and all(type(mm) in (int, float) for mm in spacing)
        if not (numbers and len(spacing) == 2 and all(0 < mm < 1e3 for mm in spacing)):
            raise ConditionError(f"spacing_mm: {spacing!r:.40} came; wanted [rows, columns] in mm")
        how["spacing_mm"] = (float(spacing[0]), float(spacing[1]))
    if "fps" in how and not 0 < how["fps"] <= 1000:
        raise ConditionError(f"fps: {how['fps']!r:.40} came; wanted above 0 to 1000")
    return how


def _deadline(data: dict[str, Any]) -> float:
    seconds = data.get("deadline_s", 120.0)
    if type(seconds) not in (int, float) or not 0 < seconds <= LONGEST_DEADLINE:
        raise ConditionError(
            f"deadline_s: {seconds!r:.40} came; wanted above 0 to {LONGEST_DEADLINE:g}"
        )
    return float(seconds)


def array(name: str, value: Any) -> NDArray[Any]:
    """An array from the base64 of a .npy file.

    Raises:
        ConditionError: not base64, not npy, not numbers, or of another length than announced.
    """
    if not isinstance(value, str):
        raise ConditionError(f"{name}: {type(value).__name__} came; wanted a .npy file in base64")
    try:
        stream = io.BytesIO(base64.b64decode(value, validate=True))
        header = _HEADERS[np.lib.format.read_magic(stream)]
        shape, column_major, dtype = header(stream)
        left = stream.getbuffer()[stream.tell() :]
        if dtype.kind not in "buif" or len(left) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{dtype} of shape {shape} in {len(left)} bytes")
        flat: NDArray[Any] = np.frombuffer(left, dtype)
        return flat.reshape(shape, order="F" if column_major else "C")
    except (binascii.Error, KeyError, OverflowError, RecursionError, SyntaxError, ValueError) as e:
        line = str(e).splitlines()[0][:120] if str(e) else type(e).__name__
        raise ConditionError(f"{name}: not a .npy file of numbers in base64 ({line})") from e


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def accepted(accept: str) -> tuple[str, str] | None:
    """The media type and suffix that an Accept header asks for first; None: none of ours."""
    for part in accept.split(",") if accept else ["*/*"]:
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if "q=0" in parameters:
            continue
        if kind in KINDS:
            return kind, KINDS[kind]
        if kind in ("*/*", "video/*", "application/octet-stream"):
            return "video/mp4", ".mp4"
        if kind == "image/*":
            return "image/gif", ".gif"
    return None


def encoded(clip: Clip, suffix: str, *, mark: bool) -> bytes:
    """The bytes of `Clip.save`. Raises: FileError: no room for them on the disk, or as it says."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            return clip.save(Path(folder) / f"clip{suffix}", mark=mark).read_bytes()
    except OSError as error:
        raise FileError(f"clip: cannot be written ({error.strerror})") from error


def frame_message(header: dict[str, Any], *planes: NDArray[np.uint8]) -> bytes:
    """A binary frame: the header's length (uint32, little-endian), its JSON, planes row by row."""
    head = json.dumps(header, separators=(",", ":"), default=str).encode()
    return b"".join((struct.pack("<I", len(head)), head, *(plane.tobytes() for plane in planes)))
