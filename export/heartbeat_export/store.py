"""Versions of a bundle in its own folder: manifest.json is the one thing that is ever switched.

Files of a new version get names of their own (denoise-1f0c….onnx) beside those of the old one, and
renaming a new manifest over the old is the commit: one rename(2), atomic on every file system, and
files that did not change are shared without a link. Who has opened the old manifest goes on reading
the old files: the version before is kept whole, and older ones for a minute (GRACE_S). Killed at
any moment, a rebuild leaves the old version or the new one, and perhaps files that nothing names;
the next one sweeps them. fingerprints.previous of a manifest is the SHA-256 of the manifest that it
took over from, which stays in the folder as manifest-SHA.json.
"""

import contextlib
import errno
import hashlib
import mmap
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from heartbeat_export.onnx_bytes import Bytes
from heartbeat_fast.bundle import Bundle, FileSpec, GraphSpec, Manifest
from heartbeat_fast.engines.machine import threads
from heartbeat_fast.errors import BundleError, HeartBeatError
from heartbeat_fast.files import atomic

MANIFEST, LOCK = "manifest.json", ".rebuild.lock"
GRACE_S = 60  # for readers that opened a version just before it was replaced twice
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
DIGITS = 16  # of a SHA-256 in a file's name
# What is ours to sweep: files under names of their own, and what a killed process was writing.
OWN = re.compile(rf"[a-z_]+-[0-9a-f]{{{DIGITS}}}\.(onnx|json|md)")
UNFINISHED = re.compile(r"\..+\.tmp")


class StoreError(HeartBeatError):
    """A bundle's folder is busy, holds no earlier version, or cannot be written."""


@contextlib.contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Holds the bundle's lock; the kernel frees it when the process ends, however it ends.

    Raises:
        StoreError: another rebuild holds it and wait is False, or the folder cannot be written.
    """
    try:
        import fcntl  # POSIX only
    except ImportError as error:
        raise StoreError(
            f"{folder}: rebuilds need POSIX file locks: export anew instead"
        ) from error
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StoreError(f"{folder}: cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError as error:
        raise StoreError(f"{folder}: another rebuild is under way: wait for it") from error
    finally:
        os.close(handle)


def own_name(name: str, digest: str) -> str:
    """The name a file gets by its content's SHA-256: denoise.onnx → denoise-1f0c….onnx."""
    stem, _, suffix = name.rpartition(".")
    stem = re.sub(rf"-[0-9a-f]{{{DIGITS}}}$", "", stem).lower()
    return f"{stem}-{digest[:DIGITS]}.{suffix}"


def put(
    folder: Path, name: str, content: bytes | Iterable[Bytes], known: Mapping[str, str]
) -> FileSpec:
    """Writes content under a name of its own, or finds the file that already holds it.

    Args:
        name: what the file is called in a fresh export.
        content: bytes, or pieces of them, so that a large file need not be in memory.
        known: {SHA-256: file name} of versions that are kept (see `kept`).

    Raises:
        FileError: it cannot be written.
    """
    pieces = [memoryview(content)] if isinstance(content, bytes) else [p.data for p in content]
    hashed = hashlib.sha256()
    for piece in pieces:
        hashed.update(piece)
    digest = hashed.hexdigest()
    file = known.get(digest, own_name(name, digest))
    path = folder / file
    if not _holds(path, digest):
        with atomic(path) as temporary, temporary.open("wb") as out:
            for piece in pieces:
                out.write(piece)
    return FileSpec(file, digest, sum(map(len, pieces)))


def _holds(path: Path, digest: str) -> bool:
    """Whether a file is there and whole."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def mapped(bundle: Bundle, spec: FileSpec) -> Bytes:
    """As Bundle.read, but the file's own pages: `base`'s denoiser is never copied into memory.

    Raises:
        BundleError: as Bundle.read.
    """
    try:
        handle = os.open(bundle.path / spec.file, READ)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            size = found.st_size
            content = mmap.mmap(handle, size, access=mmap.ACCESS_READ) if size else b""
        finally:
            os.close(handle)
    except OSError as error:
        raise bundle.unreadable(spec, error) from error
    bundle.check(spec, content)
    return np.frombuffer(content, np.uint8)


def whole(bundle: Bundle) -> dict[str, Bytes]:
    """Every file of a bundle by its name, hashed: on all processors, and once.

    Raises:
        BundleError: names a file that is not what the manifest says.
    """
    files = specs(bundle.manifest)
    with ThreadPoolExecutor(threads()) as pool:  # hashing lets go of the interpreter
        contents = list(pool.map(lambda spec: mapped(bundle, spec), files))
    return {spec.file: content for spec, content in zip(files, contents, strict=True)}


def kept(bundle: Bundle) -> dict[str, str]:
    """{SHA-256: file name} of the bundle's files and of those of the version before it."""
    manifests = [bundle.manifest]
    with contextlib.suppress(HeartBeatError):
        manifests.append(previous(bundle)[0])
    return {spec.sha256: spec.file for one in reversed(manifests) for spec in specs(one)}


def specs(manifest: Manifest) -> list[FileSpec]:
    """Every file a manifest names."""
    return [*manifest.graphs.values(), *manifest.files.values()]


def named(spec: GraphSpec, file: FileSpec) -> GraphSpec:
    """A graph's entry, in another file."""
    return replace(spec, **vars(file))


def previous(bundle: Bundle) -> tuple[Manifest, bytes]:
    """The manifest that the bundle's took over from, and its bytes.

    Raises:
        StoreError: there is none, or it was swept.
        BundleError: it does not hold together.
    """
    digest = bundle.manifest.fingerprints.get("previous", "")
    path = bundle.path / _manifest_name(digest)
    if not digest or not path.is_file():
        raise StoreError(f"{bundle.path}: no earlier version is kept")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise BundleError(f"{path}: altered (SHA-256): rebuild from its checkpoint instead")
    return read_manifest(content), content


def read_manifest(content: bytes) -> Manifest:
    """A manifest of another name than manifest.json, read by the one reader there is.

    Raises:
        BundleError: it does not hold together.
    """
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / MANIFEST).write_bytes(content)
        return Bundle.open(scratch).manifest


def commit(bundle: Bundle, manifest: Manifest) -> Bundle:
    """Makes a manifest the bundle's, and what was there the version before it.

    The manifest's files must be in the folder. The caller holds the lock.

    Raises:
        StoreError: it cannot be written; then the bundle is as it was.
    """
    old = (bundle.path / MANIFEST).read_bytes()
    digest = hashlib.sha256(old).hexdigest()
    new = replace(manifest, fingerprints={**manifest.fingerprints, "previous": digest})
    _switch(bundle.path, old, new.to_json().encode())
    return Bundle(bundle.path, new)


def rollback(folder: Path, wait: bool = True) -> Bundle:
    """Puts the version before back, to the byte, once all its files were found whole.

    Raises:
        StoreError: no earlier version is kept, or the folder is busy.
        BundleError: a file of the earlier version is not whole.
    """
    with locked(folder, wait):
        bundle = Bundle.open(folder)
        manifest, content = previous(bundle)
        earlier = Bundle(folder, manifest)
        earlier.verify()
        _switch(folder, (folder / MANIFEST).read_bytes(), content)
    return earlier


def sweep(bundle: Bundle) -> None:
    """Removes what neither the bundle nor the version before it names. The caller holds the lock.

    Files that are not ours stay, whatever they are.
    """
    folder = bundle.path
    keep = {MANIFEST, _manifest_name(bundle.manifest.fingerprints.get("previous", ""))}
    keep |= set(kept(bundle).values()) | {spec.file for spec in specs(bundle.manifest)}
    gone = {path.name for path in folder.iterdir() if OWN.fullmatch(path.name)}
    for path in folder.glob("manifest-*.json"):  # retired versions, first exports among them
        if not OWN.fullmatch(path.name) or path.name in keep:
            continue
        with contextlib.suppress(HeartBeatError, OSError):
            files = {spec.file for spec in specs(read_manifest(path.read_bytes()))}
            if time.time() - path.stat().st_mtime < GRACE_S:  # written when it was replaced
                keep |= files | {path.name}
            gone |= files
    for name in gone - keep:
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _manifest_name(digest: str) -> str:
    return f"manifest-{digest[:DIGITS]}.json"


def _switch(folder: Path, old: bytes, new: bytes) -> None:
    """Keeps the old manifest under a name of its own, then renames the new one into place."""
    try:
        backup = folder / _manifest_name(hashlib.sha256(old).hexdigest())
        with atomic(backup) as temporary:
            temporary.write_bytes(old)
        _sync(folder)  # names of the new files, before the manifest that names them
        with atomic(folder / MANIFEST) as temporary:
            temporary.write_bytes(new)
        _sync(folder)
    except (OSError, HeartBeatError) as error:
        raise StoreError(f"{folder}: the new version is not in place ({error})") from error


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
