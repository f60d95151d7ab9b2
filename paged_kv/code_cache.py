"""Compiled code: loops of the package as machine code, kept on disk for the next start.

Knows numba and the one folder where machine code lies, nothing of what the code does. Whoever can
write to that folder can run anything as its owner, so it is private or it is not used: code is
then compiled at every start. It has a sub-folder for each state of the sources: numba itself looks
only at the file of the function, and would run a helper of another file as it was before.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkstemp
from typing import Any, Final, ParamSpec, TypeVar

from .private_folder import is_private, owned_folder

P = ParamSpec("P")
R = TypeVar("R")

DIGEST_BYTES: Final = 32
DAYS_KEPT_UNUSED: Final = 30
# All that compiled code is made of; the ground floor's modules are beside this one.
FOLDERS_OF_SOURCES: Final = ("", ".blocks", ".kernels", ".kernels.eager", ".kernels.cpu")

NAME_OF_SOURCES: Final = re.compile("sources-[0-9a-f]{32}")

logger: Final = logging.getLogger("paged_kv")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile a function over arrays and numbers where numba is installed, or return it as it is.

    It is compiled, or read from the disk, when it is first called.
    """
    try:
        from numba import njit
    except ImportError:
        return function
    source_hash()  # of what is being imported now, not of what is there when it is compiled
    machine_code: Any = njit(nogil=True)(function)
    keep_on_disk(machine_code, function)
    result: Callable[P, R] = machine_code
    return result


def keep_on_disk(machine_code: Any, function: Callable[..., Any]) -> None:
    """Let numba look for a function's machine code in our folder before it compiles it.

    `machine_code` is numba's object for it. A numba that looks elsewhere compiles at every start.
    """
    machine_code._cache = NumbaCache(function)


class NumbaCache:
    """What numba asks of the cache of one function."""

    cache_path = None  # numba prints it in its statistics

    def __init__(self, function: Callable[..., Any]) -> None:
        line = function.__code__.co_firstlineno
        self._function = f"{function.__module__} {function.__qualname__} {line}"

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Machine code for these types on this processor; None where it must be compiled."""
        target.refresh()
        data = read_code(self._file(signature, target.codegen()))
        if data is None:
            return None
        try:
            from numba.core.compiler import CompileResult

            rebuild: Any = CompileResult._rebuild
            return rebuild(target, *pickle.loads(data))
        except Exception:  # whatever numba says to what another build of it has written
            logger.debug("%s is compiled again", self._function, exc_info=True)
            return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what was compiled, unless it holds addresses of this process."""
        try:
            from numba.core import serialize

            dumps: Any = serialize.dumps
            if result.library.has_dynamic_globals or any(not f.can_cache for f in result.lifted):
                return
            write_code(self._file(signature, result.codegen), dumps(result._reduce()))
        except Exception:  # whatever numba says when it has changed
            logger.debug("%s is not kept", self._function, exc_info=True)

    def flush(self) -> None:
        """Numba is about to compile again: what is on disk is written over."""

    def _file(self, signature: Any, codegen: Any) -> str:
        parts = (self._function, str(signature), codegen.magic_tuple())
        return f"{sha256(repr(parts).encode()).hexdigest()}.nbc"


# -- files --------------------------------------------------------------------------------------


def read_code(name: str) -> bytes | None:
    """What was written under a name; None where it is not there, damaged, or another's."""
    folder = code_folder()
    if folder is None:
        return None
    try:
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(folder / name, flags | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or not is_private(status):
                return None
            data = file.read()
    except OSError:
        return None
    checksum, code = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return code if sha256(code).digest() == checksum else None


def write_code(name: str, code: bytes) -> None:
    """Keep machine code whole or not at all; what cannot be written costs the next start.

    Nothing is kept once the sources are others than those that were imported.
    """
    folder = code_folder()
    if folder is None or source_hash.__wrapped__() != source_hash():
        return
    with suppress(OSError):
        descriptor, partial = mkstemp(dir=folder, prefix=".partial-")
        try:
            with open(descriptor, "wb") as file:
                file.write(sha256(code).digest() + code)
            os.replace(partial, folder / name)
        except BaseException:
            os.unlink(partial)
            raise


@cache
def code_folder() -> Path | None:
    """The folder for these sources and versions, private to its owner; None where none can be."""
    sources = source_hash()
    folder = None if sources is None else owned_folder(sources, "compiled code")
    if folder is None:
        return None
    is_new = not any(folder.iterdir())
    with suppress(OSError):
        os.utime(folder)  # so that it is not taken for unused
    if is_new:
        _remove_unused(folder.parent)
    return folder


def _remove_unused(root: Path) -> None:
    """Remove folders for sources that nobody has started with for a while."""
    oldest = time.time() - DAYS_KEPT_UNUSED * 24 * 3600
    for path in root.iterdir():
        if not NAME_OF_SOURCES.fullmatch(path.name):
            continue
        with suppress(OSError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and status.st_mtime < oldest:
                shutil.rmtree(path, ignore_errors=True)


@cache
def source_hash() -> str | None:
    """Name of the folder for the sources that compiled code is made of, and for who compiles it.

    None where the sources are not to be seen (an archive, byte code alone) or numba is missing.
    """
    try:
        import llvmlite
        import numba
        import numpy
    except ImportError:
        return None
    versions = (sys.version, numba.__version__, llvmlite.__version__, numpy.__version__)
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    digest = sha256(repr((versions, settings)).encode())
    for folder in FOLDERS_OF_SOURCES:
        sources = _sources_of(folder)
        if not sources:
            return None
        for name, source in sources:
            digest.update(f"{folder} {name} {len(source)}\n".encode() + source)
    return f"sources-{digest.hexdigest()[:32]}"


def _sources_of(folder: str) -> list[tuple[str, bytes]]:
    """Names and contents of a folder's modules; empty where one of them is not to be read."""
    spec = find_spec(f"{__package__}{folder}")
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        return []
    try:
        return [(path.name, path.read_bytes()) for path in sorted(Path(places[0]).glob("*.py"))]
    except OSError:
        return []
