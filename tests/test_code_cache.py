"""Compiled code on disk: found again, never stale, never another's."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from paged_kv import code_cache
from paged_kv.code_cache import code_folder, read_code, source_hash, write_code
from paged_kv.private_folder import FOLDER_VARIABLE

numba = pytest.importorskip("numba", reason="nothing is compiled without it")

from paged_kv.kernels.cpu import native_code, vectors  # noqa: E402 -- needs numba

ROOT = Path(__file__).parent.parent
IS_ROOT = hasattr(os, "getuid") and os.getuid() == 0
NOBODY = 65534

needs_owners = pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows guards otherwise")
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root gives files away")


@pytest.fixture(autouse=True)
def start_anew() -> Iterator[None]:
    """The folder is looked for once a process; here once a test."""
    code_folder.cache_clear()
    yield
    code_folder.cache_clear()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test, which is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(FOLDER_VARIABLE, str(folder))
    return folder


def held() -> Path:
    folder = code_folder()
    assert folder is not None
    return folder


def set_mode(mode: int) -> Callable[[Path], None]:
    return lambda path: path.chmod(mode)


def give_away(path: Path) -> None:
    os.chown(path, NOBODY, NOBODY)


def put_behind_a_link(path: Path) -> None:
    moved = path.rename(path.with_name("elsewhere"))
    path.symlink_to(moved)


OTHERS = [
    pytest.param(set_mode(0o770), id="the group writes"),
    pytest.param(set_mode(0o707), id="all write"),
    pytest.param(set_mode(0o1777), id="all write to their own"),
    pytest.param(give_away, id="another owner", marks=needs_root),
    pytest.param(put_behind_a_link, id="a link"),
]


# -- the folder -----------------------------------------------------------------------------------


@needs_owners
def test_what_is_made_is_private(root: Path) -> None:
    before = os.umask(0)
    try:
        write_code("name", b"code")
    finally:
        os.umask(before)
    assert read_code("name") == b"code"
    assert [path.name for path in held().iterdir()] == ["name"]
    modes = [path.stat().st_mode & 0o777 for path in (root, held(), held() / "name")]
    assert modes == [0o700, 0o700, 0o600]


@needs_owners
@pytest.mark.parametrize("spoil", OTHERS)
@pytest.mark.parametrize("place", ["the root", "the folder of these sources"])
def test_a_folder_that_is_not_private_is_refused_once_and_loudly(
    root: Path, place: str, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    write_code("name", b"code")
    folder = held()
    spoil(root if place == "the root" else folder)
    code_folder.cache_clear()
    before = sorted(root.rglob("*"))
    with caplog.at_level(logging.WARNING, logger="paged_kv"):
        assert read_code("name") is None
        write_code("other", b"code")
        assert code_folder() is None
    assert len(caplog.messages) == 1
    assert str(root if place == "the root" else folder) in caplog.messages[0]
    assert FOLDER_VARIABLE in caplog.messages[0]
    assert sorted(root.rglob("*")) == before


@needs_owners
@pytest.mark.parametrize(
    ("spoil", "is_refused"),
    [
        pytest.param(set_mode(0o777), True, id="all write"),
        pytest.param(set_mode(0o775), True, id="the group writes"),
        pytest.param(set_mode(0o1777), False, id="all write to their own"),
        pytest.param(set_mode(0o755), False, id="all read"),
        pytest.param(put_behind_a_link, False, id="a link of ours"),
        pytest.param(give_away, True, id="another owner", marks=needs_root),
    ],
)
def test_parents_that_others_can_write_to_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Path], None],
    is_refused: bool,
) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    spoil(parent)
    monkeypatch.setenv(FOLDER_VARIABLE, str(parent / "between" / "cache"))
    write_code("name", b"code")
    assert read_code("name") == (None if is_refused else b"code")


def test_a_shared_temporary_folder_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody_is_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in (FOLDER_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", nobody_is_home)
    assert code_folder() is None
    write_code("name", b"code")
    assert read_code("name") is None


def test_a_home_that_cannot_be_written_costs_only_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for variable in (FOLDER_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "home").write_text("no folder: not even root makes one in it")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    for _ in range(2):
        write_code("name", b"code")
        assert read_code("name") is None
    assert len(caplog.messages) == 1
    assert add_two_compiled() == (42, True)


def test_folders_of_other_sources_go_when_unused_for_long(root: Path) -> None:
    old, new, thesis = f"sources-{0:032x}", f"sources-{1:032x}", "sources-of-my-thesis"
    for name, days in ((old, 40), (new, 20), (thesis, 400)):
        (root / name).mkdir(mode=0o700, parents=True)
        (root / name / "file").write_text("code")
        os.utime(root / name, (time.time() - days * 24 * 3600,) * 2)
    root.chmod(0o700)
    write_code("name", b"code")
    names = {path.name for path in root.iterdir()}
    assert names == {new, thesis, held().name}


# -- files ----------------------------------------------------------------------------------------


@needs_owners
@pytest.mark.parametrize("spoil", OTHERS)
def test_a_file_that_is_not_private_is_not_read_but_replaced(
    root: Path, spoil: Callable[[Path], None]
) -> None:
    write_code("name", b"code")
    spoil(held() / "name")
    assert read_code("name") is None
    write_code("name", b"code")
    assert read_code("name") == b"code"
    assert not (held() / "name").is_symlink()


def test_what_is_no_file_is_not_read(root: Path) -> None:
    (held() / "folder").mkdir()
    assert read_code("folder") is None
    write_code("folder", b"code")
    assert read_code("folder") is None
    if hasattr(os, "mkfifo"):
        os.mkfifo(held() / "pipe")
        assert read_code("pipe") is None
    assert {path.name for path in held().iterdir()} <= {"folder", "pipe"}


def test_nothing_is_kept_once_the_sources_have_changed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `git pull` under a running process: its folder is named for what it imported."""
    monkeypatch.setattr(source_hash, "__wrapped__", lambda: "sources-other")
    write_code("name", b"code")
    assert read_code("name") is None


# -- microkernels ---------------------------------------------------------------------------------


def add_two_compiled() -> tuple[int, bool]:
    """40 + 2 by machine code, and whether it was compiled now."""
    emitter = vectors.Emitter("add", 3)
    a, b, target = emitter.arguments
    emitter.store(emitter.builder.add(a, b), target)
    written: list[str] = []

    def noted(name: str, code: bytes) -> None:
        written.append(name)
        write_code(name, code)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "write_code", noted)
        code = vectors.MachineCode("add", emitter.finish())
    result = ctypes.c_int64()
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(code.address)
    function(40, 2, ctypes.addressof(result))
    return result.value, bool(written)


def test_microkernels_are_compiled_once(root: Path) -> None:
    assert add_two_compiled() == (42, True)
    (file,) = held().iterdir()
    before = file.stat().st_mtime_ns
    assert add_two_compiled() == (42, False)
    assert [path.name for path in held().iterdir()] == [file.name]
    assert file.stat().st_mtime_ns == before


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte less": lambda data: data[:-1],
    "garbage": lambda data: b"no object file" * 50,
    "flipped": lambda data: data[:41] + bytes([data[41] ^ 0xFF]) + data[42:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_microkernel_is_compiled_again(root: Path, damage: str) -> None:
    """A full disk or a crash leaves files like these."""
    add_two_compiled()
    (file,) = held().iterdir()
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert add_two_compiled() == (42, True)
    assert add_two_compiled() == (42, False)


# -- numba's functions ----------------------------------------------------------------------------


def add_one(number: int) -> int:
    return number + 1


def loop_compiled() -> bool:
    """Whether a loop was compiled now; its result is looked at."""
    loop = code_cache.compiled(add_one)
    assert loop(41) == 42
    return sum(loop.stats.cache_misses.values()) == 1  # type: ignore[attr-defined]


def store_through(address: int) -> None:
    native_code.store_long(native_code.address_of(address), 0, 42)


def worker_compiled() -> bool:
    """Whether a worker was compiled now; its result is looked at."""
    result = ctypes.c_int64()
    callback = native_code.worker(store_through)
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(callback.address)(ctypes.addressof(result))
    assert result.value == 42
    return callback.cache_hits == 0


COMPILED = {"loop": loop_compiled, "worker": worker_compiled}


@pytest.mark.parametrize("kind", COMPILED)
def test_functions_are_compiled_once(root: Path, kind: str) -> None:
    assert COMPILED[kind]()
    assert not COMPILED[kind]()
    assert len(list(held().iterdir())) == 1


@pytest.mark.parametrize("kind", COMPILED)
@pytest.mark.parametrize("damage", [*DAMAGES, "no pickle", "another pickle"])
def test_a_damaged_function_is_compiled_again(root: Path, kind: str, damage: str) -> None:
    COMPILED[kind]()
    (file,) = held().iterdir()
    if damage in DAMAGES:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    else:
        write_code(file.name, b"no pickle" if damage == "no pickle" else b"N.")
    assert COMPILED[kind]()
    assert not COMPILED[kind]()


@needs_owners
@pytest.mark.parametrize("kind", COMPILED)
def test_a_planted_function_is_not_executed(root: Path, kind: str, tmp_path: Path) -> None:
    COMPILED[kind]()
    (file,) = held().iterdir()
    trap = tmp_path / "executed"
    planted = f"cposix\nsystem\n(S'touch {trap}'\ntR.".encode()
    file.write_bytes(sha256(planted).digest() + planted)
    file.chmod(0o666)
    assert COMPILED[kind]()
    assert not trap.exists()


@pytest.mark.parametrize("kind", COMPILED)
def test_another_numba_compiles_at_every_start(
    root: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not numba's public interface may go: that costs time and nothing else."""
    from numba.core.compiler import CompileResult

    monkeypatch.delattr(CompileResult, "_reduce")
    monkeypatch.delattr(CompileResult, "_rebuild")
    for _ in range(2):
        assert COMPILED[kind]()
    assert list(held().iterdir()) == []


# -- processes ------------------------------------------------------------------------------------

CALLER = """
from ..code_cache import compiled
from .helper_of_this_test import helper

@compiled
def caller(number):
    return helper(number)

print(caller(40), sum(caller.stats.cache_hits.values()))
"""
HELPER = """
from ..code_cache import compiled

@compiled
def helper(number):
    return number + {}
"""


def copy_package(folder: Path) -> Path:
    """The package with a loop that calls a helper of another file."""
    ignored = shutil.ignore_patterns("__pycache__", "demo_model", "kernels", "scheduler")
    shutil.copytree(ROOT / "paged_kv", folder / "paged_kv", ignore=ignored)
    for name in ("kernels", "scheduler"):
        shutil.copytree(ROOT / name, folder / "paged_kv" / name, ignore=ignored)
    (folder / "paged_kv" / "blocks" / "caller_of_this_test.py").write_text(CALLER)
    return folder


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-B", "-c", "import paged_kv.blocks.caller_of_this_test"],
        cwd=folder,
        env={**os.environ, FOLDER_VARIABLE: str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_changed_helper_in_another_file_is_compiled_anew(tmp_path: Path) -> None:
    folder, cache = copy_package(tmp_path / "checkout"), tmp_path / "cache"
    outputs = []
    for number in (1, 1, 2, 1):
        helper = folder / "paged_kv" / "blocks" / "helper_of_this_test.py"
        helper.write_text(HELPER.format(number))
        output, errors = start(folder, cache).communicate()
        outputs.append((output, errors))
    # From disk where the sources are as they were, also when they come back.
    assert outputs == [("41 0\n", ""), ("41 1\n", ""), ("42 0\n", ""), ("41 1\n", "")]
    assert len(list(cache.iterdir())) == 2
    assert not list(folder.rglob("*.nb[ic]"))


def test_processes_that_start_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    folder, cache = copy_package(tmp_path / "checkout"), tmp_path / "cache"
    helper = folder / "paged_kv" / "blocks" / "helper_of_this_test.py"
    helper.write_text(HELPER.format(2))
    processes = [start(folder, cache) for _ in range(3)]
    for process in processes:
        output, errors = process.communicate()
        assert (output.split()[0], errors) == ("42", "")
    (sources,) = cache.iterdir()
    assert sorted(path.suffix for path in sources.iterdir()) == [".nbc", ".nbc"]
