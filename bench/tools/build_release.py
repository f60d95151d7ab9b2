"""Build the wheel and the source distribution of the last commit, always the same bytes.

Knows git and setuptools. What differs between checkouts is left out: uncommitted files, modes of
files, times, paths. Prints what it built.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

BUILD = "import sys; from setuptools import build_meta as b; b.build_{}(sys.argv[1])"


def git(checkout: Path, *arguments: str) -> bytes:
    return subprocess.run(
        ["git", "-C", str(checkout), *arguments], check=True, capture_output=True
    ).stdout


def build(checkout: Path, target: Path, kinds: list[str]) -> list[Path]:
    """The files that were built, in `target`."""
    epoch = git(checkout, "log", "-1", "--format=%ct").decode().strip()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": epoch, "LC_ALL": "C.UTF-8"}
    target.mkdir(parents=True, exist_ok=True)
    before = os.umask(0o022)
    try:
        with TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(git(checkout, "archive", "HEAD"))) as archive:
                archive.extractall(folder, filter="data")  # modes 644 and 755
            built = Path(folder) / "dist"
            built.mkdir()
            for kind in kinds:
                command = [sys.executable, "-c", BUILD.format(kind), str(built)]
                subprocess.run(command, cwd=folder, env=environment, check=True, stdout=2)
            return [copy(path, target, int(epoch)) for path in sorted(built.iterdir())]
    finally:
        os.umask(before)


def copy(path: Path, target: Path, epoch: int) -> Path:
    """A built file in `target`; setuptools writes times and owners into source distributions."""
    content = path.read_bytes()
    if path.name.endswith(".tar.gz"):
        content = normalized(content, epoch)
    (target / path.name).write_bytes(content)
    return target / path.name


def normalized(archive: bytes, epoch: int) -> bytes:
    result = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(archive)) as old,
        gzip.GzipFile("", "wb", fileobj=result, mtime=epoch) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda each: each.name):
            member.mtime, member.pax_headers = epoch, {}
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            new.addfile(member, old.extractfile(member) if member.isreg() else None)
    return result.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the last commit of a checkout.")
    parser.add_argument("target", type=Path)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--only", choices=("wheel", "sdist"))
    options = parser.parse_args()
    kinds = [options.only] if options.only else ["sdist", "wheel"]
    for path in build(options.checkout, options.target, kinds):
        print(path)


if __name__ == "__main__":
    main()
