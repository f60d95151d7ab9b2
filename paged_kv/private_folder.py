"""Folders that outlive a process and that nobody but their owner can write to.

Knows where they lie and who may write there, nothing of what is kept in them.
"""

from __future__ import annotations

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final

from .errors import ConfigError

FOLDER_VARIABLE: Final = "PAGED_KV_CACHE_DIR"
OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH

logger: Final = logging.getLogger("paged_kv")


def owned_folder(name: str, what: str) -> Path | None:
    """A folder of that name where nobody else can write; None, saying what is not kept then."""
    root = _root_folder()
    if root is None:
        return None
    # Where its parents really are; the folder itself must be no link.
    root = Path(os.path.realpath(root.parent)) / root.name
    reason = _make_private(root / name, root)
    if reason is not None:
        logger.warning(
            "%s is not kept: %s; %s can name another folder", what, reason, FOLDER_VARIABLE
        )
        return None
    return root / name


def private_folder_at(path: Path) -> Path:
    """A folder that a user names, made where it is not there; raises `ConfigError` where others
    could write to it."""
    try:
        folder = path.expanduser().absolute()
        folder = Path(os.path.realpath(folder.parent)) / folder.name
        reason = _make_private(folder, folder)
    except (RuntimeError, ValueError) as error:  # nobody's home, or no name of a file
        reason = str(error)
    if reason is not None:
        raise ConfigError(f"{str(path)!r} cannot be a folder that only we write to: {reason}")
    return folder


def _make_private(folder: Path, root: Path) -> str | None:
    """Make a folder of the root folder, and the root; why neither may be used, None if they may."""
    for path in (*reversed(root.parents), root, folder):
        try:
            path.mkdir(mode=0o700, exist_ok=True)
            status = path.lstat()
        except FileExistsError:
            return f"{path} is no folder"
        except OSError as error:
            return f"{path} cannot be made ({error.strerror})"
        if not stat.S_ISDIR(status.st_mode):
            return f"{path} is a symbolic link"
        if path not in (root, folder):
            if not _is_safe_parent(status):
                return f"others can write to {path}, above {root}"
        elif not is_private(status):
            return f"{path} belongs to another user, or others can write to it"
    return None


def _root_folder() -> Path | None:
    """PAGED_KV_CACHE_DIR, or the user's cache folder; None where nobody's home."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        with suppress(RuntimeError):  # a user without a home
            return Path(chosen).expanduser().absolute()
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder.absolute() / "paged_kv"


def is_private(status: os.stat_result) -> bool:
    """Whether only we can write; Windows guards a user's folders by other means."""
    if not hasattr(os, "getuid"):
        return True
    return status.st_uid == os.getuid() and not status.st_mode & OTHERS_WRITE


def _is_safe_parent(status: os.stat_result) -> bool:
    """Whether nobody but us and the system can put another folder in the place of ours."""
    if not hasattr(os, "getuid"):
        return True
    is_ours = status.st_uid in (0, os.getuid())
    return is_ours and (bool(status.st_mode & stat.S_ISVTX) or not status.st_mode & OTHERS_WRITE)
