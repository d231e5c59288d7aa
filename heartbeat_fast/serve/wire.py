"""OpenIGTLink messages in and out: pyigtl's codec, with limits before anything is allocated.

Only what can be a message of ours is read on: a header that is not one, or that announces more than
the cap, ends the connection, since nothing after it can be trusted. A sound message with a wrong
body is refused and the connection goes on. Legend: F frames, H W pixels.
"""

import json
import socket
from dataclasses import dataclass, replace
from math import atan2, cos, degrees, radians, sin
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heartbeat_fast.anatomy import Anatomy
from heartbeat_fast.errors import HeartBeatError, optional
from heartbeat_fast.playback import Frame
from heartbeat_fast.untrusted import parse

ECHO, CONDITION, STATUS = "Echo", "EchoCondition", "EchoStatus"
PICTURES = {"EchoMask": "mask", "EchoSketch": "sketch", "EchoImage": "image"}
PICTURES |= {"EchoSkeleton": "skeleton"}
HEADER = 58  # bytes
MAX_TEXT = 64 * 2**10  # a STRING's length has 16 bits
TREMBLE_MM, TREMBLE_DEGREES = 1.0, 1.0  # of a hand: a pose that moved less shows nothing new
FAR_MM, FAR_DEGREES = 40.0, 30.0
TYPES = ("STRING", "TRANSFORM", "IMAGE")


class WireError(HeartBeatError):
    """A message that is refused; what it asked for is not done."""


class Broken(HeartBeatError):
    """Bytes that are no OpenIGTLink, or too many: the connection cannot go on."""


@dataclass(frozen=True)
class Pose:
    """A probe's pose as its TRANSFORM says: millimetres and degrees.

    x lateral, to the image's right; y in depth; z out of the image's plane; angle about z.
    """

    x: float
    y: float
    z: float
    angle: float

    def near(self, other: "Pose") -> bool:
        """Whether it moved less than a hand trembles."""
        moved = max(abs(self.x - other.x), abs(self.y - other.y))
        return moved < TREMBLE_MM and abs(self.angle - other.angle) < TREMBLE_DEGREES


def under(heart: Anatomy | None, pose: Pose | None) -> Anatomy | None:
    """A heart as a moved probe sees it: it goes the other way. Bounded to what can be in view."""
    if heart is None or pose is None:
        return heart
    x, y = (min(max(v, -FAR_MM), FAR_MM) for v in (pose.x, pose.y))
    turn = -radians(min(max(pose.angle, -FAR_DEGREES), FAR_DEGREES))
    across, deep = heart.apex[0] - x, heart.apex[1] - y
    apex = (across * cos(turn) - deep * sin(turn), across * sin(turn) + deep * cos(turn))
    return replace(heart, apex=apex, tilt=heart.tilt - turn)


@dataclass(frozen=True)
class Message:
    """One message of a client: its type, device and content (dict, Pose or array)."""

    kind: str
    device: str
    content: Any


def codec() -> Any:
    """pyigtl's messages. Raises: MissingDependency: it is not installed."""
    return optional("pyigtl.messages", "serve")


def image(frame: Frame, spacing_mm: tuple[float, float]) -> bytes:
    """An IMAGE message of a frame: one slice (1,H,W), spacing in its matrix, its time as stamp."""
    rows, columns = spacing_mm
    message = codec().ImageMessage(
        frame.pixels[None],
        ijk_to_world_matrix=np.diag([columns, rows, 1.0, 1.0]),
        timestamp=frame.time,
        device_name=ECHO,
    )
    packed: bytes = message.pack()
    return packed


def text(device: str, facts: dict[str, Any]) -> bytes:
    """A STRING message of a JSON object, in ASCII."""
    content = json.dumps(facts, ensure_ascii=True, allow_nan=False)
    packed: bytes = codec().StringMessage(content[: MAX_TEXT - 1], device_name=device).pack()
    return packed


def largest(frames: int, size: int) -> int:
    """Bytes of the longest body that can be a condition: a clip of float64 and its headers."""
    return frames * size * size * 8 + 2 * MAX_TEXT


def receive(connection: socket.socket, most: int) -> Message:
    """The next message; waits for it as long as it takes.

    Args:
        connection: with a timeout, which ends a message that stalls, never the wait for one.
        most: bytes of a body; more are not read.

    Raises:
        WireError: it is refused, and read to its end.
        Broken: nothing after it can be read.
        OSError: the connection ended.
    """
    header = _header(_exactly(connection, HEADER, patient=True))
    kind, device, size = header["message_type"], header["device_name"], header["body_size"]
    if size > most:
        raise Broken(f"{kind} {device}: announces {size} bytes; wanted at most {most}")
    body = _exactly(connection, size)
    if kind not in TYPES:
        raise WireError(f"{kind[:12]!r}: unknown type; wanted {', '.join(TYPES)}")
    if header["crc"] not in (0, codec().CRC64(body)):  # 0: the sender keeps none
        raise WireError(f"{kind} {device}: its check sum does not fit: sent again?")
    message = codec().MessageBase.create_message(kind)
    try:
        message.unpack(header, body)
        return Message(kind, device, _content(message, kind, device))
    except HeartBeatError:
        raise
    except Exception as error:  # the codec has no errors of its own
        raise WireError(f"{kind} {device}: malformed ({type(error).__name__})") from error


def _header(content: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = codec().MessageBase.parse_header(content)
    except (UnicodeDecodeError, ValueError) as error:
        raise Broken("not an OpenIGTLink header: connect an OpenIGTLink client") from error
    if found["header_version"] not in (1, 2, 3) or not found["message_type"].isascii():
        raise Broken(f"not an OpenIGTLink header (version {found['header_version']})")
    return found | {"crc": int.from_bytes(content[-8:], "big")}


def _exactly(connection: socket.socket, count: int, patient: bool = False) -> bytes:
    """So many bytes. patient: waits for the first one however long it takes."""
    content = bytearray(count)
    view, done = memoryview(content), 0
    while done < count:
        try:
            got = connection.recv_into(view[done:])
        except TimeoutError:
            if patient and not done:
                continue
            raise
        if not got:
            raise ConnectionResetError("closed by the client")
        done += got
    return bytes(content)


def _content(message: Any, kind: str, device: str) -> Any:
    if kind == "STRING":
        fields = parse(message.string.encode(), MAX_TEXT)
        if not isinstance(fields, dict):
            raise WireError(f"{device}: {type(fields).__name__} came; wanted a JSON object")
        return fields
    if kind == "TRANSFORM":
        return _pose(np.asarray(message.matrix, np.float64))
    return _picture(np.asarray(message.image), device)


def _pose(matrix: NDArray[np.float64]) -> Pose:
    if matrix.shape != (4, 4) or not np.isfinite(matrix).all():
        raise WireError("TRANSFORM: wanted a finite 4 x 4 matrix")
    x, y, z = (float(v) for v in matrix[:3, 3])
    return Pose(x, y, z, degrees(atan2(matrix[1, 0], matrix[0, 0])))


def _picture(pixels: NDArray[Any], device: str) -> NDArray[Any]:
    """What an IMAGE holds, as conditions take it: bytes of soft maps become 0 to 1."""
    if device not in PICTURES:
        raise WireError(f"IMAGE {device[:20]!r}: wanted a device of {', '.join(PICTURES)}")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    if pixels.ndim == 3 and len(pixels) == 1:
        pixels = pixels[0]
    if pixels.dtype == np.uint8 and PICTURES[device] in ("sketch", "skeleton"):
        return pixels.astype(np.float32) / np.float32(255)
    return pixels
