"""Files, read with limits and written whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heartbeat_fast.errors import FileError

LARGEST = 2**31  # bytes of a file, or of the pixels it announces


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
