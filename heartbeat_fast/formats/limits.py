"""What all readers of untrusted files share: limits on one picture, and one typed error."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from heartbeat_fast.errors import FileError, MissingDependency

LARGEST_PICTURE = 2**26  # pixels: 8K video has half as many, an ultrasound screen a fiftieth
DENSEST = 1032  # bytes that deflate can make of one; blank JPEG and RLE stay below


def check_picture(path: str | Path, height: int, width: int) -> None:
    """Refuses an announced picture that no scanner makes, before it is decoded.

    Raises:
        FileError: more than LARGEST_PICTURE pixels.
    """
    if height * width > LARGEST_PICTURE:
        raise FileError(
            f"{path}: announces pictures of {height} x {width}; wanted at most "
            f"{LARGEST_PICTURE} pixels"
        )


def check_density(path: str | Path, announced: int, stored: int) -> None:
    """Refuses an announced size that the bytes at hand cannot hold, however well compressed.

    Raises:
        FileError: more than DENSEST bytes announced for each stored.
    """
    if announced > DENSEST * max(stored, 4096):
        raise FileError(f"{path}: announces {announced} bytes of pixels in {stored} bytes of file")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turns whatever a library raises about a hostile file into one line that names it.

    Raises:
        FileError: unreadable.
        MissingDependency: passed on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom warns page-long about damaged files
            yield
    except (FileError, MissingDependency):
        raise
    except Exception as error:
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise FileError(f"{path}: not readable as {kind} ({line})") from error
