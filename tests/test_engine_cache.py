"""The engine cache: what is kept comes back, and nothing foreign, altered or stale ever does."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from heartbeat_fast.engines.cache import EngineCache, default_folder, fingerprint
from heartbeat_fast.errors import EngineError

FACTS = {"engine": "some 1.2", "graph": "a" * 64, "device": "SM86"}
OTHER = {**FACTS, "graph": "b" * 64}
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "engines")


def kept(cache: EngineCache, facts: dict[str, str] = FACTS) -> Path:
    path = cache.put(facts, CONTENT, "denoise for SM86")
    assert path is not None
    return path


@pytest.mark.filterwarnings("error")
def test_built_once_then_served(cache: EngineCache) -> None:
    calls: list[int] = []

    def build() -> bytes:
        calls.append(1)
        return CONTENT

    assert cache.load(FACTS, build) == CONTENT
    assert cache.load(dict(reversed(FACTS.items())), build) == CONTENT
    assert EngineCache(cache.folder).load(FACTS, build) == CONTENT
    assert len(calls) == 1


@pytest.mark.parametrize("name", sorted(FACTS))
def test_any_other_fact_is_another_engine(name: str, cache: EngineCache) -> None:
    kept(cache)
    assert cache.get({**FACTS, name: "other"}) is None
    assert fingerprint(FACTS) != fingerprint({**FACTS, name: "other"})


def test_folder_and_files_are_private(cache: EngineCache) -> None:
    old = os.umask(0)
    try:
        path = kept(cache)
    finally:
        os.umask(old)
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    for file in (path, cache.folder / "key"):
        assert file.stat().st_mode & 0o777 == 0o600
    assert sorted(p.name for p in cache.folder.iterdir()) == sorted([path.name, "key"])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    real = path.with_name("elsewhere")
    path.rename(real)
    path.symlink_to(real)


ATTACKS: dict[str, Callable[[Path], object]] = {
    "magic": lambda path: flip(path, 0),
    "length": lambda path: flip(path, 9),
    "huge header": lambda path: flip(path, 11),
    "digest": lambda path: flip(path, 20),
    "header": lambda path: flip(path, 60),
    "engine": lambda path: flip(path, -1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a few bytes": lambda path: path.write_bytes(path.read_bytes()[:30]),
    "empty": lambda path: path.write_bytes(b""),
    "group-writable": lambda path: path.chmod(0o660),
    "world-readable": lambda path: path.chmod(0o604),
    "link": link,
    "hard link": lambda path: os.link(path, path.with_name("second")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    "another key": lambda path: (path.parent / "key").write_bytes(bytes(32)),
    "no key": lambda path: (path.parent / "key").unlink(),
    "short key": lambda path: (path.parent / "key").write_bytes(b"short"),
    "public key": lambda path: (path.parent / "key").chmod(0o644),
}


@pytest.mark.filterwarnings("ignore:engine cache .* not kept")  # a folder in a file's place stays
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.timeout(20)  # a pipe opened for reading would wait for a writer
def test_unsound_entries_are_built_anew(attack: str, cache: EngineCache) -> None:
    ATTACKS[attack](kept(cache))
    with pytest.warns(UserWarning, match=r"not used \(.+\): built anew"):
        assert cache.load(FACTS, lambda: b"new") == b"new"
    if attack != "folder":
        assert cache.get(FACTS) == b"new"


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_every_byte_counts(place: int, cache: EngineCache) -> None:
    flip(kept(cache), place)
    with pytest.warns(UserWarning, match="not used"):
        assert cache.get(FACTS) is None


def test_an_engine_under_another_name_is_stale(cache: EngineCache) -> None:
    kept(cache).rename(cache.path(OTHER))
    with pytest.warns(UserWarning, match="something else under this name"):
        assert cache.get(OTHER) is None
    assert not cache.path(OTHER).exists()


def test_an_engine_of_another_cache_is_foreign(cache: EngineCache, tmp_path: Path) -> None:
    other = EngineCache(tmp_path / "other")
    kept(cache)
    shutil.copy2(kept(other), cache.path(FACTS))
    with pytest.warns(UserWarning, match="written elsewhere"):
        assert cache.get(FACTS) is None


def test_another_owner(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kept(cache)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.warns(UserWarning, match=f"owned by user {me}, not {me + 1}"):
        assert cache.get(FACTS) is None
    assert path.exists()  # not ours to remove
    with pytest.warns(UserWarning, match="not kept"):
        assert cache.put(FACTS, CONTENT) is None
    assert "not used" in cache.state()


def test_one_file_of_another_owner(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = kept(cache), os.fstat
    inode = path.stat().st_ino

    def fstat(handle: int) -> os.stat_result:
        status = real(handle)
        if status.st_ino != inode:
            return status
        return os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.warns(UserWarning, match="owned by user"):
        assert cache.get(FACTS) is None
    assert not path.exists()


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755])
def test_an_open_folder_is_not_used(mode: int, cache: EngineCache) -> None:
    path = kept(cache)
    cache.folder.chmod(mode)
    with pytest.warns(UserWarning, match="engine cache") as said:
        assert cache.load(FACTS, lambda: b"new") == b"new"
    assert ["open to other users" in str(w.message) for w in said] == [True, True]
    assert path.exists()
    assert f"mode {mode:03o}" in cache.state()


def test_a_linked_folder_is_not_used(cache: EngineCache, tmp_path: Path) -> None:
    kept(cache)
    linked = EngineCache(tmp_path / "linked")
    linked.folder.symlink_to(cache.folder)
    with pytest.warns(UserWarning, match="a link to one"):
        assert linked.get(FACTS) is None
    assert cache.get(FACTS) == CONTENT


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path / "engines", limit=3 * len(CONTENT) + 2000)
    facts = [{**FACTS, "graph": f"{i}"} for i in range(4)]
    for age, fact in enumerate(facts[:3]):
        os.utime(kept(cache, fact), (1e9 + age, 1e9 + age))
    assert cache.get(facts[0]) == CONTENT  # used now, so the second is the oldest
    kept(cache, facts[3])
    assert [cache.get(fact) is not None for fact in facts] == [True, False, True, True]
    with pytest.warns(UserWarning, match="at most"):
        assert cache.put(OTHER, bytes(cache.limit + 1)) is None


def test_an_announced_size_is_refused_unread(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = kept(cache)
    with path.open("r+b") as file:
        file.truncate(2**40)  # sparse: a terabyte that takes no disk
    with pytest.warns(UserWarning, match="too large"):
        assert cache.get(FACTS) is None
    with pytest.raises(EngineError, match="at most 65536"):
        cache.put({"long": "x" * 70000}, CONTENT)


def test_a_full_disk_is_a_warning(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert cache.load(FACTS, lambda: CONTENT) == CONTENT
    assert list(cache.folder.iterdir()) == []


def test_listing_and_clearing(cache: EngineCache) -> None:
    os.utime(kept(cache), (1e9, 1e9))
    flip(kept(cache, OTHER), -1)
    with pytest.warns(UserWarning, match="altered"):
        (entry,) = cache.entries()
    assert (entry.facts, entry.label, entry.bytes) == (FACTS, "denoise for SM86", len(CONTENT))
    assert "1 engines" in cache.state()
    assert cache.clear() == 1
    assert cache.get(FACTS) is None


def test_what_a_killed_process_left_goes(cache: EngineCache) -> None:
    kept(cache)
    left, fresh = cache.folder / ".old-0.tmp", cache.folder / ".new-0.tmp"
    for path in (left, fresh):
        path.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    kept(cache, OTHER)
    assert (left.exists(), fresh.exists()) == (False, True)


@pytest.mark.filterwarnings("error")
def test_many_at_once(cache: EngineCache) -> None:
    """One key is agreed on, and every engine is whole."""
    got: list[bytes] = []

    def work(i: int) -> None:
        facts = {**FACTS, "graph": str(i % 4)}
        got.append(EngineCache(cache.folder).load(facts, lambda: CONTENT))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [CONTENT] * 16
    assert len(list(cache.entries())) == 4


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HEARTBEAT_CACHE", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "heartbeat_fast" / "engines"
    monkeypatch.setenv("HEARTBEAT_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
