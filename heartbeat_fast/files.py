"""Files, read with limits and written whole or not at all."""

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heartbeat_fast.errors import FileError

LARGEST = 2**30  # bytes of a file, or pixels it announces


def readable(path: str | Path) -> Path:
    """The path of an existing, non-empty file of sane size.

    Raises:
        FileError: missing, a folder, empty, or larger than LARGEST.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"{path}: {'a folder' if path.is_dir() else 'no such file'}; wanted a file")
    size = path.stat().st_size
    if not 0 < size <= LARGEST:
        raise FileError(f"{path}: {size} bytes; wanted 1 to {LARGEST}")
    return path


def check_pixels(path: str | Path, *shape: int) -> None:
    """Refuses an announced array before anything is allocated for it.

    Raises:
        FileError: empty, or more than LARGEST numbers.
    """
    if not 0 < math.prod(shape) <= LARGEST or min(shape) < 1:
        size = " x ".join(map(str, shape))
        raise FileError(f"{path}: announces {size} values; wanted 1 to {LARGEST}")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yields a temporary file beside `path`; on success it is synced and renamed onto `path`.

    On any error (a full disk, an interrupt) the temporary file goes and `path` is as it was.

    Raises:
        FileError: the operating system refused, with its reason.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".tmp", f".{path.stem}-", path.parent)
        os.close(handle)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror})") from error
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # mkstemp makes files private; this one is a product
        temporary.replace(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)
