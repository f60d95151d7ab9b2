"""What is built and where it runs: checkouts without symbolic links, wheels, source distributions.

Builds need setuptools, not a network.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from tools.build_release import build as build_release

import paged_kv

ROOT = Path(__file__).parent.parent
LINKED = ("kernels", "scheduler")
SOURCES = (*LINKED, "paged_kv", "tests", "bench", "docs", "examples", ".ci")
LEFT_OUT = shutil.ignore_patterns("__pycache__")

IMPORTS = """
import importlib.util, pathlib, sys
import paged_kv, paged_kv.kernels.rules, paged_kv.scheduler.request
from paged_kv import Scheduler
assert pathlib.Path(paged_kv.__file__).is_relative_to(sys.argv[1]), paged_kv.__file__
for name in ("kernels.cpu.plan", "kernels.eager.store", "kernels.triton.plan"):
    found = importlib.util.find_spec(f"paged_kv.{name}")
    assert pathlib.Path(found.origin).is_relative_to(sys.argv[1]), found.origin
for name in ("tests", "bench", "paged_kv", "docs"):
    assert importlib.util.find_spec(f"paged_kv.{name}") is None, name
assert paged_kv.kernels.__file__ is None
"""
# The interpreter that runs the tests mostly has paged_kv installed already.
FORGET_INSTALLATIONS = """
import sys, pathlib
sys.path = [path for path in sys.path if not (pathlib.Path(path) / "paged_kv").exists()]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
"""


def run(*command: str, cwd: Path, path: Path | None = None) -> str:
    """Output of a Python command in a new interpreter that takes paged_kv from `path` or `cwd`."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(path or cwd), "HOME": str(cwd)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def without_links(folder: Path) -> Path:
    """The sources of this checkout without the two links, as an archive without links unpacks."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name in SOURCES:
            shutil.copytree(path, folder / path.name, ignore=LEFT_OUT, symlinks=True)
        elif path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    for name in LINKED:
        (folder / "paged_kv" / name).unlink(missing_ok=True)
    return folder


def clone_without_links(folder: Path) -> Path:
    """The last commit, its links written as small text files."""
    command = ["git", "clone", "-q", "-c", "core.symlinks=false", str(ROOT), str(folder)]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git, and a checkout made by it")
    subprocess.run(command, check=True, capture_output=True)
    assert (folder / "paged_kv" / "kernels").read_text() == "../kernels"
    return folder


CHECKOUTS: dict[str, Callable[[Path], Path]] = {
    function.__name__: function for function in (without_links, clone_without_links)
}


def build_wheel(checkout: Path, target: Path) -> Path:
    """As pip does it, without asking a network for setuptools."""
    pytest.importorskip("setuptools", reason="builds need it")
    target.mkdir()
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(target)!r})"
    run("-c", build, cwd=checkout)
    (wheel,) = target.glob("*.whl")
    return wheel


def build_sdist(checkout: Path, target: Path) -> Path:
    """The source distribution, unpacked."""
    pytest.importorskip("setuptools", reason="builds need it")
    target.mkdir()
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(target)!r})"
    run("-c", build, cwd=checkout)
    (archive,) = target.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(target, filter="data")
    (folder,) = (path for path in target.iterdir() if path.is_dir())
    return folder


def package_files(checkout: Path) -> set[str]:
    """What an installation from a checkout holds."""
    package = checkout / "paged_kv"
    found = [*package.rglob("*.py"), package / "py.typed", *package.glob("demo_model/*")]
    found += [package / "models" / "calibration.txt", *package.glob("entrypoints/server/page/*")]
    names = {path.relative_to(checkout).as_posix() for path in found}
    for folder in LINKED:
        paths = (checkout / folder).rglob("*.py")
        names |= {f"paged_kv/{path.relative_to(checkout).as_posix()}" for path in paths}
    return names


def files(folder: Path) -> set[str]:
    """All files below a folder but what a build writes beside the sources."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path.as_posix() for path in found if not path.parts[0].endswith(("egg-info", "build"))}


def wheel_files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


@pytest.mark.parametrize("checkout", CHECKOUTS)
def test_a_checkout_without_links_runs_and_builds_whole(tmp_path: Path, checkout: str) -> None:
    folder = CHECKOUTS[checkout](tmp_path / "checkout")
    run("-c", IMPORTS, str(folder), cwd=folder)
    wheel = build_wheel(folder, tmp_path / "wheel")
    assert wheel_files(wheel) == package_files(folder)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    run("-c", IMPORTS, str(tmp_path / "installed"), cwd=tmp_path, path=tmp_path / "installed")


def test_an_editable_install_without_links_finds_both_folders(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds need it")
    folder, site = without_links(tmp_path / "checkout"), tmp_path / "site"
    site.mkdir()
    run("-c", f"from setuptools.build_meta import *; build_editable({str(site)!r})", cwd=folder)
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    install = FORGET_INSTALLATIONS + f"import site; site.addsitedir({str(site)!r})\n"
    run("-c", install + IMPORTS, str(folder), cwd=site)


def test_a_checkout_without_a_folder_is_no_wheel_and_says_so(tmp_path: Path) -> None:
    folder = without_links(tmp_path / "checkout")
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(AssertionError, match=r"package directory '.*scheduler' does not exist"):
        build_wheel(folder, tmp_path / "wheel")
    with pytest.raises(AssertionError, match="ImportError: paged_kv is incomplete: neither"):
        run("-c", "import paged_kv", cwd=folder)


def test_a_foreign_folder_beside_an_installation_is_not_taken_for_ours(tmp_path: Path) -> None:
    without_links(tmp_path / "checkout")
    site = tmp_path / "site-packages"
    site.mkdir()
    shutil.move(tmp_path / "checkout" / "paged_kv", site)
    shutil.move(tmp_path / "checkout" / "kernels", site)
    with pytest.raises(AssertionError, match="ImportError: paged_kv is incomplete: neither"):
        run("-c", "import paged_kv", cwd=site)


def test_an_sdist_holds_what_a_checkout_holds_and_its_tests_run(tmp_path: Path) -> None:
    folder = build_sdist(without_links(tmp_path / "checkout"), tmp_path / "sdist")
    checkout = tmp_path / "checkout"
    assert files(folder) - {"PKG-INFO", "setup.cfg"} == files(checkout) - {".gitignore"}
    run("-c", IMPORTS, str(folder), cwd=folder)
    tests = ("tests/test_units.py", "tests/cache/test_formats.py")
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=folder)
    wheel = build_wheel(folder, tmp_path / "wheel")
    assert wheel_files(wheel) == package_files(folder)
    assert wheel.name == f"paged_kv-{paged_kv.__version__}-py3-none-any.whl"


def test_two_checkouts_of_a_commit_give_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="builds need it")
    checkout = clone_without_links(tmp_path / "checkout")
    for path in (*checkout.glob("*/*.py"), *checkout.glob("*.toml")):
        path.chmod(0o600)  # and now is not when the tests' own checkout was made
    (checkout / "paged_kv" / "uncommitted.py").write_text("")
    (wheel,) = build_release(ROOT, tmp_path / "one", ["wheel"])
    before = os.umask(0o077)
    try:
        (same,) = build_release(checkout, tmp_path / "two", ["wheel"])
    finally:
        os.umask(before)
    assert wheel.read_bytes() == same.read_bytes()


def test_the_newest_changes_are_those_of_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    newest = re.findall(r"^## \[([\d.]+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$", changes, re.M)[0]
    assert paged_kv.__version__.partition(".dev")[0] == newest


def test_the_list_of_packages_is_the_folders() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings it")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setup["packages"] == sorted(
        {str(Path(name).parent).replace("/", ".") for name in package_files(ROOT)}
    )
