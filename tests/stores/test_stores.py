"""Stores of entries: each keeps what is put, forgets what was used least lately, and says so."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import fakeredis
import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from paged_kv import ConfigError, MissingDependencyError
from paged_kv.stores.block_store import BlockStore
from paged_kv.stores.folder_store import STALE_SECONDS, FolderStore
from paged_kv.stores.fsspec_store import FsspecStore
from paged_kv.stores.opening import open_store
from paged_kv.stores.redis_store import RedisStore

ROOT = Path(__file__).parents[2]
MakeStore = Callable[..., BlockStore]


def key_of(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


def memory_url(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}-{os.getpid()}"


@pytest.fixture(params=["folder", "fsspec", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> MakeStore:
    """A store of that kind; several of them hold the same entries."""
    server = fakeredis.FakeServer()

    def make_store(max_bytes: int = 1 << 20) -> BlockStore:
        if request.param == "folder":
            return FolderStore(tmp_path / "store", max_bytes)
        if request.param == "fsspec":
            return FsspecStore(memory_url(tmp_path), max_bytes)
        return RedisStore("", max_bytes, client=fakeredis.FakeRedis(server=server))

    return make_store


def test_an_entry_is_kept_replaced_and_forgotten(make):
    store, other = make(), make()
    assert isinstance(store, BlockStore)
    first, second = key_of(1), key_of(2)
    assert store.get(first) is None
    store.put(first, b"one")
    store.put(second, bytes(range(256)))
    assert other.contains([second, key_of(3), first]) == [True, False, True]
    assert other.contains([]) == []
    assert (other.get(first), other.get(second)) == (b"one", bytes(range(256)))
    other.put(first, b"")
    assert store.get(first) == b""
    store.remove(second)
    store.remove(second)
    assert other.get(second) is None
    assert store.contains([second]) == [False]


def test_the_limit_is_held_and_what_was_used_goes_last(make):
    store = make(max_bytes=10_000)
    for number in range(10):
        store.put(key_of(number), bytes(1000))
        time.sleep(0.002)  # times of files are as coarse as the kernel's clock
    assert all(store.contains([key_of(number) for number in range(10)]))
    assert store.get(key_of(0)) == bytes(1000)
    time.sleep(0.01)
    store.put(key_of(10), bytes(1000))
    is_there = store.contains([key_of(number) for number in range(11)])
    assert sum(is_there) <= 10
    assert is_there[10]
    assert not is_there[1]
    if not isinstance(store, FsspecStore):  # which does not know what was read
        assert is_there[0]


def test_many_entries_stay_below_the_limit(make):
    store = make(max_bytes=20_000)
    sizes = dict.fromkeys(range(200), 0)
    for number in sizes:
        sizes[number] = 100 + 37 * number % 900
        store.put(key_of(number), bytes(sizes[number]))
        is_there = store.contains([key_of(each) for each in sizes])
        assert sum(size for size, there in zip(sizes.values(), is_there, strict=True) if there) <= (
            20_000
        )
        assert is_there[number]
    assert sum(is_there) > 15


def test_an_entry_that_is_replaced_counts_once(make):
    store = make(max_bytes=10_000)
    for size in range(3000, 3010):
        store.put(key_of(0), bytes(size))
    store.put(key_of(1), bytes(4000))
    assert store.contains([key_of(0), key_of(1)]) == [True, True]
    assert store.get(key_of(0)) == bytes(3009)


def test_what_never_fits_is_refused_and_takes_nothing_away(make):
    store = make(max_bytes=1000)
    store.put(key_of(0), bytes(900))
    with pytest.raises(OSError, match="1001 bytes is larger than the store's limit of 1000"):
        store.put(key_of(1), bytes(1001))
    assert store.contains([key_of(0), key_of(1)]) == [True, False]


# -- folders --------------------------------------------------------------------------------------


def test_a_folder_is_its_owners_alone(tmp_path):
    store = FolderStore(tmp_path / "new" / "store", 1000)
    store.put(key_of(0), b"data")
    assert store.path.stat().st_mode & 0o777 == 0o700
    (file,) = store.path.iterdir()
    assert file.name == f"{key_of(0).hex()}.kv"
    assert file.stat().st_mode & 0o777 == 0o600
    store.path.chmod(0o770)
    with pytest.raises(ConfigError, match="others can write to it"):
        FolderStore(store.path, 1000)
    store.path.chmod(0o700)
    (tmp_path / "link").symlink_to(store.path)
    with pytest.raises(ConfigError, match="is a symbolic link"):
        FolderStore(tmp_path / "link", 1000)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file is no folder"):
        FolderStore(tmp_path / "file", 1000)


def test_files_of_others_are_left_alone(tmp_path):
    store = FolderStore(tmp_path, 1000)
    others = [tmp_path / "notes.txt", tmp_path / "large.kv.bak"]
    for path in others:
        path.write_bytes(bytes(5000))
        os.utime(path, (0, 0))
    for number in range(20):
        store.put(key_of(number), bytes(300))
    assert all(path.exists() for path in others)
    assert sum(store.contains([key_of(number) for number in range(20)])) <= 3


def test_a_file_that_was_cut_off_is_no_entry_and_goes_in_time(tmp_path):
    store = FolderStore(tmp_path, 1000)
    part = tmp_path / f".{key_of(1).hex()}.77.00ff00ff.part"
    part.write_bytes(bytes(400))
    assert store.get(key_of(1)) is None
    store.put(key_of(2), bytes(100))
    assert part.exists()  # somebody may be writing it
    past = time.time() - STALE_SECONDS - 1
    os.utime(part, (past, past))
    for number in range(3, 13):
        store.put(key_of(number), bytes(100))
    assert not part.exists()


def test_a_smaller_limit_holds_at_once(tmp_path):
    for number in range(10):
        FolderStore(tmp_path, 10_000).put(key_of(number), bytes(1000))
    FolderStore(tmp_path, 3000)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3000


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    store = FolderStore(tmp_path / "store", 10_000)
    shutil.rmtree(store.path)
    assert store.get(key_of(0)) is None
    store.put(key_of(0), b"data")
    assert store.get(key_of(0)) == b"data"


def test_what_is_no_file_is_no_entry(tmp_path):
    store = FolderStore(tmp_path, 3000)
    store._path(key_of(0)).mkdir()
    os.mkfifo(store._path(key_of(1)))
    assert store.contains([key_of(0), key_of(1)]) == [False, False]
    assert store.get(key_of(0)) is store.get(key_of(1)) is None
    for number in range(2, 20):
        store.put(key_of(number), bytes(500))
    assert store.contains([key_of(19)]) == [True]


def test_objects_of_others_are_left_alone(tmp_path):
    url = memory_url(tmp_path)
    store, others = open_store(url, 1000), open_store(f"{url}/others", 1000)
    others.put(key_of(0), bytes(900))
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"/{url.removeprefix('memory://')}/theirs.kv", bytes(900))
    for number in range(1, 20):
        store.put(key_of(number), bytes(500))
    assert others.get(key_of(0)) == bytes(900)
    assert memory.exists(f"/{url.removeprefix('memory://')}/theirs.kv")


def test_a_folder_is_made_and_never_a_bucket(tmp_path, monkeypatch):
    """Filesystems of object stores make the bucket of what they are told to make with parents."""
    made = []
    monkeypatch.setattr(
        MemoryFileSystem,
        "mkdir",
        lambda _, path, create_parents=True, **options: made.append((path, create_parents)),
    )
    url = memory_url(tmp_path)
    for where in (url, f"{url}/", f"{url}/folder"):
        open_store(where, 1000)
    assert made == [(f"/{url.removeprefix('memory://')}/folder", False)]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    store = FolderStore(tmp_path, 1000)

    def fail(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        store.put(key_of(0), bytes(100))
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys
from hashlib import sha256
from paged_kv.stores.folder_store import FolderStore

store, first, count = FolderStore(sys.argv[1], 2_000_000), int(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
number = first
while number < first + count:
    key = sha256(str(number % 500).encode()).digest()
    data = store.get(key)
    assert data is None or (len(data) == 10_032 and sha256(data[32:]).digest() == data[:32])
    body = bytes([number % 251]) * 10_000
    store.put(key, sha256(body).digest() + body)
    number += 1
"""


def writer(path: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), str(first), str(count)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == "ready\n"
    return process


def test_processes_share_a_folder_and_one_is_killed(tmp_path):
    """Nobody ever reads part of an entry, and the limit holds but for what is put between looks."""
    killed = writer(tmp_path, 0, 1_000_000)
    both = [writer(tmp_path, first, 600) for first in (100, 300)]
    time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    assert killed.wait(timeout=60) == -signal.SIGKILL
    store = FolderStore(tmp_path, 2_000_000)
    keys = [key_of(number) for number in range(500)]
    entries = [data for data in map(store.get, keys) if data is not None]
    assert len(entries) > 100
    assert all(sha256(data[32:]).digest() == data[:32] for data in entries)
    assert sum(map(len, entries)) <= 2_000_000 + 3 * 2_000_000 // 32


# -- opening --------------------------------------------------------------------------------------


def test_a_path_is_a_folder_and_a_url_what_it_names(tmp_path, monkeypatch):
    store = open_store(tmp_path / "a b", "1MiB")
    assert isinstance(store, FolderStore)
    store.put(key_of(0), b"data")
    assert open_store(f"file://{tmp_path}/a%20b").get(key_of(0)) == b"data"
    assert open_store(f"FILE://localhost{tmp_path}/a%20b").get(key_of(0)) == b"data"
    assert isinstance(open_store(f"local://{tmp_path}/a%20b"), FolderStore)
    assert isinstance(open_store(memory_url(tmp_path)), FsspecStore)
    assert isinstance(open_store("redis://localhost:1/0"), RedisStore)
    monkeypatch.chdir(tmp_path)
    open_store("here").put(key_of(1), b"")
    assert len(list((tmp_path / "here").iterdir())) == 1


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "a folder or a url, got ''"),
        (7, "a folder or a url, got 7"),
        ("nothing://x/y", "cannot be at 'nothing://x/y'"),
        ("redis://host:port/0", "cannot be at 'redis://host:port/0'"),
        ("redis://me:secret@host:port/0", "cannot be at 'redis://host:port/0'"),
        ("nothing://me:secret@x/y", "cannot be at 'nothing://x/y'"),
        ("file://kv/x", "cannot be at 'file://kv/x': a folder's url has three slashes"),
        ("file:kv", "begins with file://, got 'file:kv'"),
        ("REDIS:/x", "begins with redis://, got 'REDIS:/x'"),
        ("://x", "cannot be at '://x': its url has no scheme"),
        ("~nobody-of-this-name/x", "'~nobody-of-this-name/x' cannot be a folder"),
        ("a\0b", "cannot be a folder that only we write to: embedded null byte"),
        (__file__, "test_stores.py is no folder"),
    ],
)
def test_what_cannot_be_opened_is_named(where, message):
    with pytest.raises(ConfigError, match=message):
        open_store(where)


def test_a_size_that_cannot_be_is_named(tmp_path):
    with pytest.raises(ConfigError, match="block_store_size must be"):
        open_store(tmp_path, "much")


@pytest.mark.parametrize(
    ("package", "where"), [("redis", "redis://host/0"), ("fsspec.core", "s3://bucket/folder")]
)
def test_what_is_missing_is_named(package, where, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'paged-kv\[store\]'"):
        open_store(where)


def test_times_of_objects_are_read_as_filesystems_tell_them():
    from paged_kv.stores.fsspec_store import written_at

    told: list[dict[str, Any]] = [
        {"mtime": 5},
        {"created": "1970-01-01T00:00:05+00:00"},
        {"updated": "no time", "created": 5.0},
        {},
    ]
    assert [written_at(about) for about in told] == [5, 5, 5, 0]
