"""Files that nobody vouches for: a bounded read of a regular file, and one reading of its JSON.

Python's JSON reader takes NaN and infinities, keeps the last of two equal keys, and leaves by
RecursionError or ValueError on nesting and long numbers. Here all of that is one typed error.
"""

import errno
import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from heartbeat_fast.errors import HeartBeatError


class JsonError(HeartBeatError):
    """Bytes that are not JSON, or JSON that readers would take differently."""


def regular(path: Path, most: int) -> bytes:
    """A regular file's bytes, one more than `most` at the most: whoever asks sees it is too long.

    Opening a pipe would wait for a writer for ever, and a device may act on being opened.

    Raises:
        OSError: not there, not readable, or not a regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return file.read(min(found.st_size, most) + 1)  # read() allocates what it is asked for


def parse(content: bytes, most: int) -> Any:
    """The value of a JSON text.

    Args:
        content: UTF-8.  most: bytes; more is refused before parsing.

    Raises:
        JsonError: not JSON, too long, too deep, a key twice, or a number that is not finite.
    """
    if len(content) > most:
        raise JsonError(f"JSON of {len(content)} bytes exceeds {most}")
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_once,
            parse_float=_finite,
            parse_constant=_refuse,
        )
    except JsonError:
        raise
    except RecursionError as error:
        raise JsonError("JSON nested too deep") from error
    except ValueError as error:  # malformed JSON, not UTF-8, an integer of thousands of digits
        raise JsonError(f"not JSON ({error})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise JsonError(f"key {double[:40]!r} stands twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise JsonError(f"number {text[:40]} is not finite")
    return value


def _refuse(text: str) -> NoReturn:
    raise JsonError(f"number {text} is not finite")
