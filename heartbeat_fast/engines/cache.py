"""The cache of compiled engines: local files that are never shipped and never trusted.

An engine file is code for its runtime, so a file that anybody else could have written must not be
loaded, and one of other weights must not be served. Each entry is one file named by its build
fingerprint, and carries that fingerprint, what it was built from, and an HMAC over all of it with a
key that lives in the same private folder. Whatever is foreign, altered, truncated or under another
name is removed with a warning and built again.

Layout of an entry: MAGIC, 4 bytes length of the header (little endian), 32 bytes HMAC-SHA-256 over
that length and what follows, the header (JSON), the engine.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heartbeat_fast.engines.private_files import READ, Unsound, check_owned
from heartbeat_fast.errors import EngineError, FileError
from heartbeat_fast.files import atomic

MAGIC = b"HBENGIN1"
HEADER_MAX = 2**16
ENTRY_MAX = 8 * 2**30  # bytes of one engine; Stable Diffusion's size in half is 2
LIMIT = 24 * 2**30  # bytes of all entries together; the least recently used go first
FIXED = len(MAGIC) + 4 + 32
STALE_S = 3600  # a temporary file older than this was left by a killed process


@dataclass(frozen=True)
class Entry:
    """One sound entry: its key, label, what it was built from, size, and last use (Unix time)."""

    key: str
    label: str
    facts: dict[str, Any]
    bytes: int
    used: float


def fingerprint(facts: Mapping[str, Any]) -> str:
    """The build fingerprint: SHA-256 of facts as canonical JSON.

    Args:
        facts: JSON values that decide the engine's bytes: SHA-256 of the graph (architecture,
            weights, shapes and precision at once), engine and version, driver, device, options.
    """
    text = json.dumps(dict(facts), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def default_folder() -> Path:
    """HEARTBEAT_CACHE, else heartbeat_fast/engines in the user's cache directory."""
    if chosen := os.environ.get("HEARTBEAT_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "heartbeat_fast" / "engines"


class EngineCache:
    """Engines by build fingerprint, in one private folder."""

    def __init__(self, folder: Path | None = None, limit: int = LIMIT) -> None:
        """Nothing is created or read yet.

        Args:
            folder: default_folder() where none is given.
            limit: bytes of all entries together.
        """
        self.folder = folder or default_folder()
        self.limit = limit

    def load(self, facts: Mapping[str, Any], build: Callable[[], bytes], label: str = "") -> bytes:
        """The engine of these facts: from the cache where a sound one is, else built and kept.

        Where the cache cannot be used (foreign folder, full disk) a warning says why, and the
        engine is built each time.

        Args:
            label: for people, in `list` and warnings, e.g. "denoise for SM86".
        """
        found = self.get(facts)
        if found is None:
            found = build()
            self.put(facts, found, label)
        return found

    def get(self, facts: Mapping[str, Any]) -> bytes | None:
        """The engine's bytes, verified; None where there is none or it was removed as unsound."""
        path = self.path(facts)
        try:
            self._check_folder()
            if not os.path.lexists(path):
                return None
            content = self._verified(path)[1]
        except (Unsound, OSError) as reason:
            self._refuse(path, reason)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def put(self, facts: Mapping[str, Any], content: bytes, label: str = "") -> Path | None:
        """Keeps an engine, and lets the least recently used go beyond the limit.

        Returns the file, or None, after a warning, where it could not be kept.

        Raises:
            EngineError: the facts are too long for a header: a mistake of the caller.
        """
        path = self.path(facts)
        said = {"key": path.stem, "label": label, "facts": dict(facts), "bytes": len(content)}
        header = json.dumps(said, sort_keys=True).encode()
        if len(header) > HEADER_MAX:
            raise EngineError(f"engine cache: {len(header)} bytes of facts; at most {HEADER_MAX}")
        try:
            self._check_folder(create=True)
            if len(content) > min(ENTRY_MAX, self.limit):
                raise Unsound(f"{len(content)} bytes; at most {min(ENTRY_MAX, self.limit)}")
            digest = _digest(self._key(), header, content)
            parts = (MAGIC, len(header).to_bytes(4, "little"), digest, header, content)
            self._write(path, parts)
            self._trim(path)
        except (Unsound, OSError, FileError) as reason:
            warnings.warn(f"engine cache {self.folder}: not kept ({reason})", stacklevel=3)
            return None
        return path

    def path(self, facts: Mapping[str, Any]) -> Path:
        """Where the engine of these facts lies, or would."""
        return self.folder / f"{fingerprint(facts)}.engine"

    def entries(self) -> Iterator[Entry]:
        """Every sound entry, last used first; unsound ones are removed with a warning."""
        for used, _, path in reversed(self._files()):
            try:
                header, content = self._verified(path)
            except (Unsound, OSError) as reason:
                self._refuse(path, reason)
                continue
            yield Entry(header["key"], header["label"], header["facts"], len(content), used)

    def headers(self) -> Iterator[Entry]:
        """Every entry as its header describes it, unverified: quick to list, whatever its size.
        Only to say what is there; what is used comes from `get`."""
        try:
            self._check_folder()
        except Unsound:
            return
        for used, size, path in self._files():
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                with os.fdopen(os.open(path, READ), "rb") as file:
                    check = file.read(FIXED)
                    length = int.from_bytes(check[len(MAGIC) : len(MAGIC) + 4], "little")
                    said = json.loads(file.read(min(length, HEADER_MAX)))
                if fingerprint(said["facts"]) == path.stem:
                    yield Entry(path.stem, said["label"], said["facts"], size, used)

    def clear(self) -> int:
        """Removes every entry; returns how many there were."""
        files = self._files()
        for _, _, path in files:
            path.unlink(missing_ok=True)
        return len(files)

    def state(self) -> str:
        """One line for `doctor`: the folder, and why it is not used where it is not."""
        try:
            self._check_folder()
        except Unsound as reason:
            return f"{self.folder}: not used, {reason}"
        files = self._files()
        size = sum(size for _, size, _ in files) / 1e6
        return f"{self.folder}: {len(files)} engines, {size:.1f} MB of {self.limit / 1e6:.0f}"

    def _verified(self, path: Path) -> tuple[dict[str, Any], bytes]:
        """Header and engine of a file whose owner, mode, length, HMAC and name are right.

        Everything is read through one handle: what was checked is what is used.
        """
        handle = os.open(path, READ)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(file.fileno())
            check_owned(status)
            # No name at all: another process put the same entry in its place just now.
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
                raise Unsound("not a plain file of one name")
            if not FIXED < status.st_size <= ENTRY_MAX + HEADER_MAX + FIXED:
                raise Unsound(f"truncated or too large ({status.st_size} bytes)")
            fixed = file.read(FIXED)
            length = int.from_bytes(fixed[len(MAGIC) : len(MAGIC) + 4], "little")
            if not fixed.startswith(MAGIC) or not 0 < length <= HEADER_MAX:
                raise Unsound("no engine of this cache")
            header, content = file.read(length), file.read(status.st_size)
        if not hmac.compare_digest(fixed[-32:], _digest(self._key(), header, content)):
            raise Unsound("altered, or written elsewhere")
        said: dict[str, Any] = json.loads(header)
        if f"{said['key']}.engine" != path.name or fingerprint(said["facts"]) != said["key"]:
            raise Unsound("an engine of something else under this name")
        return said, content

    def _check_folder(self, create: bool = False) -> None:
        """Raises Unsound unless the folder is absent, or ours alone and no link."""
        if create:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            status = self.folder.lstat()
            if not stat.S_ISDIR(status.st_mode):
                raise Unsound("no folder, or a link to one")
            check_owned(status)

    def _key(self) -> bytes:
        """The HMAC key, made on first use. One that others could know is replaced, and with it
        every entry becomes unsound."""
        path = self.folder / "key"
        for _ in range(3):
            try:
                handle = os.open(path, READ)
                with os.fdopen(handle, "rb") as file:
                    check_owned(os.fstat(file.fileno()))
                    if len(key := file.read(33)) == 32:
                        return key
                path.unlink(missing_ok=True)
            except Unsound:
                path.unlink(missing_ok=True)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another process was first
                    self._write(path, (secrets.token_bytes(32),), os.link)
        raise Unsound("its key cannot be kept private")

    def _write(
        self, path: Path, parts: tuple[bytes, ...], name: Callable[[Path, Path], Any] = os.replace
    ) -> None:
        """A file of mode 0600 from the moment it has its name."""
        staged = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
        try:
            with atomic(staged) as temporary, temporary.open("wb") as file:
                file.writelines(parts)
            staged.chmod(0o600)
            name(staged, path)
        finally:
            staged.unlink(missing_ok=True)

    def _trim(self, keep: Path) -> None:
        """Removes the least recently used beyond the limit, and what killed processes left."""
        for path in self.folder.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_S:
                    path.unlink()
        files = self._files()
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total > self.limit and path != keep:
                total -= size
                path.unlink(missing_ok=True)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of each entry, least recently used first."""
        found = []
        for path in self.folder.glob("*.engine"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                status = path.lstat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _refuse(self, path: Path, reason: Exception) -> None:
        """Says why a file is not used, and removes it where it is in a folder of ours."""
        said = reason.strerror if isinstance(reason, OSError) else reason
        warnings.warn(f"engine cache {path}: not used ({said}): built anew", stacklevel=4)
        with contextlib.suppress(Unsound, OSError):
            self._check_folder()
            path.unlink(missing_ok=True)


def _digest(key: bytes, header: bytes, content: bytes) -> bytes:
    digest = hmac.new(key, len(header).to_bytes(4, "little"), hashlib.sha256)
    digest.update(header)
    digest.update(content)
    return digest.digest()
