"""Whether a type checker knows the whole public interface: `pyright --verifytypes`.

Exits with 1 where the type of a public name is unknown, or left for a checker to guess.
basedpyright is pyright with a node of its own. vLLM, which few have, is anything at all here.
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
ANYTHING = "from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n"


def imported_modules(package: str) -> set[str]:
    """Modules of another package that this one takes names from."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "paged_kv").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = {node.module for node in nodes if node.module and not node.level} | {package}
    return {name for name in names if name.partition(".")[0] == package}


def write_stubs(folder: Path, package: str) -> None:
    for module in imported_modules(package):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            place = folder.joinpath(*parts[:end])
            place.mkdir(exist_ok=True)
            (place / "__init__.pyi").write_text(ANYTHING)


def main() -> int:
    with TemporaryDirectory() as folder:
        if not find_spec("vllm"):
            write_stubs(Path(folder), "vllm")
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
