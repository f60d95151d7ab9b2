"""Whether a type checker knows the whole public interface: `pyright --verifytypes`.

Exits with 1 where the type of a public name is unknown, or left for a checker to guess.
basedpyright is pyright with a node of its own. vLLM, LMCache and Ray, which few have, are stubs.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]
FEW_HAVE = ("vllm", "lmcache", "ray")
ANYTHING = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"


def imported_names(package: str) -> dict[str, set[str]]:
    """What this package takes out of which modules of another one."""
    found: dict[str, set[str]] = {package: set()}
    for path in (ROOT / "paged_kv").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
                continue
            if node.module.partition(".")[0] == package:
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def write_stubs(folder: Path, package: str) -> None:
    """Its modules, in which what is written as classes are is a class, and the rest anything."""
    for module, names in imported_names(package).items():
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:end])
            place.mkdir(exist_ok=True)
            (place / "__init__.pyi").touch()
        classes = "".join(f"class {name}: ...\n" for name in sorted(names) if name[0].isupper())
        with (place / "__init__.pyi").open("a") as stub:
            stub.write(ANYTHING + classes)


def main() -> int:
    with TemporaryDirectory() as folder:
        for package in FEW_HAVE:
            if not find_spec(package):
                write_stubs(Path(folder), package)
        command = ["basedpyright", "--pythonpath", sys.executable]
        command += ["--verifytypes", "paged_kv", "--ignoreexternal"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), folder])}
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    print(result.stdout[-8000:] if result.returncode else result.stdout[-600:], result.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
