"""The house in figures: longest files and functions, most arguments, import arrows, circles.

    python bench/tools/house.py [CHECKOUT] [--most 10]
    python bench/tools/house.py --tree > docs/structure.md

Reads sources and imports none of them, so that any commit can be looked at. Needs only Python.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PACKAGE = "paged_kv"
TOP_LEVEL = ("kernels", "scheduler")  # folders beside the package that install inside it

TREE_OPENING = """# Structure

Every file in one line, written by `make structure` from what the file says of itself.
`CONTRIBUTING.md` says what to put where."""
# Folders from the ground up, and what is in each.
FOLDERS = {
    "paged_kv": "The ground floor: what every room may use.",
    "paged_kv/blocks": "Who holds which block. numpy, never torch.",
    "paged_kv/stores": "Where copies of blocks outlive a process: bytes under keys.",
    "scheduler": "Who computes next. No torch. Installs as `paged_kv.scheduler`.",
    "kernels": "The border between a cache and its kernels. Installs as `paged_kv.kernels`.",
    "kernels/eager": "The kernels in torch: the fallback.",
    "kernels/cpu": "The CPU's own kernels: numba and LLVM.",
    "kernels/triton": "A GPU's kernels.",
    "paged_kv/cache": "The bytes in the blocks; the one room that calls kernels.",
    "paged_kv/models": "What a model is, and how it is run on a cache.",
    "paged_kv/engine": "Requests of token ids in, tokens out.",
    "paged_kv/integrations": "The cache where other libraries take one.",
    "paged_kv/integrations/vllm": "The cache inside vLLM, as a plugin.",
    "paged_kv/benchmarks": "What `paged-kv bench` and `bench/*.py` measure with.",
    "paged_kv/benchmarks/fleet": "Fleets on paper: real schedulers, simulated time.",
    "paged_kv/entrypoints": "What people and programs call.",
    "paged_kv/entrypoints/server": "An `LLM` over HTTP, and what is told of it.",
    "paged_kv/integrations/ray_serve": "Our `LLM` on Ray Serve: replicas behind one endpoint.",
    "docs/pictures": "The drawings of the documentation.",
    "examples": "Short programs that run as they stand.",
    "bench": "Measurements. `results/` holds what they wrote, `NOTES.md` what was learned.",
    "bench/peers": "What we compare with.",
    "bench/peers/engines": "Engines that decode, each in a process and an environment of its own.",
    "bench/tables": "What reports are as tables and sentences of README and docs (`make results`).",
    "bench/pictures": "What reports are as pictures, light and dark.",
    "bench/tools": "Looking at machine code, tuning launches, this list.",
    "bench/training": "How the demo model and its adapter were made.",
    "tests": "The house, what is built, and what belongs to no room.",
    "tests/blocks": "Tests of `paged_kv/blocks`.",
    "tests/stores": "Tests of `paged_kv/stores`.",
    "tests/scheduler": "Tests of `scheduler`.",
    "tests/kernels": "Tests of `kernels`.",
    "tests/cache": "Tests of `paged_kv/cache`.",
    "tests/models": "Tests of `paged_kv/models`.",
    "tests/engine": "Tests of `paged_kv/engine`.",
    "tests/benchmarks": "Tests of `paged_kv/benchmarks`.",
    "tests/entrypoints": "Tests of `paged_kv/entrypoints`.",
    "tests/server": "Tests of `paged_kv/entrypoints/server`.",
    "tests/integrations": "Tests of `paged_kv/integrations`, in an environment of their own.",
    "tests/ray": "Tests of what runs in Ray, in the environment of vLLM.",
    "tests/support": "Oracles, drivers and fleets that tests share.",
    "tests/support/ptx": "A GPU emulated: Triton's kernels as PTX, on a CPU.",
    "tests/soak": "What runs for hours (`make soak`), not with the tests.",
}


class Function(NamedTuple):
    """A function of a module: where it is, its lines, its arguments without `self`."""

    name: str
    num_lines: int
    num_arguments: int


def module_files(root: Path) -> dict[str, Path]:
    """Files of the package and its two folders by dotted name, the __init__ ones left out."""
    package = root / PACKAGE
    paths = {
        path.relative_to(package): path
        for path in package.rglob("*.py")
        if path.relative_to(package).parts[0] not in TOP_LEVEL
    }
    for folder in TOP_LEVEL:
        paths |= {path.relative_to(root): path for path in (root / folder).rglob("*.py")}
    return {
        ".".join(name.with_suffix("").parts): path
        for name, path in sorted(paths.items())
        if path.stem != "__init__"
    }


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of ours that a module imports, type-checking imports left out.

    A name that is no module is given as it stands, for a test to find.
    """
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    folder = [PACKAGE, *module.split(".")[:-1]]
    found: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        base = folder[: len(folder) - node.level + 1] if node.level else []
        name = ".".join([*base, *filter(None, (node.module or "").split("."))])
        if name.partition(".")[0] != PACKAGE:
            continue
        name = name.removeprefix(PACKAGE).removeprefix(".")
        from_folder = {f"{name}.{alias.name}".removeprefix(".") for alias in node.names}
        found |= {name} if name in modules else from_folder
    return found


def functions_of(path: Path) -> Iterator[Function]:
    """Every function of a file, methods and inner functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
            num_arguments = sum(name not in ("self", "cls") for name in names)
            assert node.end_lineno is not None
            yield Function(node.name, node.end_lineno - node.lineno + 1, num_arguments)


def circles(arrows: dict[str, set[str]]) -> set[str]:
    """Modules that import each other, in a circle or on the way between two."""
    waiting = dict(arrows)
    while True:
        free = {name for name, needed in waiting.items() if not needed & waiting.keys()}
        if not free:
            break
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    while True:  # and those that none of the rest imports
        imported = set().union(*waiting.values()) if waiting else set()
        if imported >= waiting.keys():
            return set(waiting)
        waiting = {name: needed for name, needed in waiting.items() if name in imported}


def opening(path: Path) -> str:
    """The first sentence of a file, which says what it knows; empty where it has none."""
    paragraph = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    first, *more = paragraph.splitlines() or [""]
    return first if first.endswith(".") else " ".join([first, *more])


def tree(root: Path) -> str:
    """docs/structure.md: every file with its first sentence, folder by folder."""
    lines = [TREE_OPENING]
    for folder, note in FOLDERS.items():
        paths = [path for path in sorted((root / folder).glob("*.py")) if path.stem != "conftest"]
        if paths:
            lines += ["", f"## {folder}/", "", note, ""]
            lines += [f"- `{path.name}`: {opening(path)}" for path in paths]
    return "\n".join(lines) + "\n"


def print_most(title: str, rows: list[tuple[int, str]], most: int) -> None:
    print(f"\n{title}")
    for count, name in sorted(rows, reverse=True)[:most]:
        print(f"{count:7}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parent.parent.parent
    parser.add_argument("checkout", type=Path, nargs="?", default=here)
    parser.add_argument("--most", type=int, default=10, help="how many of each (10)")
    parser.add_argument("--tree", action="store_true", help="print docs/structure.md instead")
    arguments = parser.parse_args()
    if arguments.tree:
        print(tree(arguments.checkout), end="")
        return
    modules = module_files(arguments.checkout)
    arrows = {name: imports_of(name, path, modules) for name, path in modules.items()}
    lengths = [(len(path.read_text().splitlines()), name) for name, path in modules.items()]
    functions = [(name, f) for name, path in modules.items() for f in functions_of(path)]
    print(
        f"{len(modules)} modules, {sum(length for length, _ in lengths)} lines, "
        f"{sum(map(len, arrows.values()))} import arrows, "
        f"in circles: {', '.join(sorted(circles(arrows))) or 'none'}"
    )
    long = sum(length > 500 for length, _ in lengths)
    print(
        f"over 500 lines: {long} files; over 60 lines: "
        f"{sum(f.num_lines > 60 for _, f in functions)} functions; over 8 arguments: "
        f"{sum(f.num_arguments > 8 for _, f in functions)} functions"
    )
    print_most("longest files", lengths, arguments.most)
    named = [(f, f"{name}: {f.name}") for name, f in functions]
    print_most("longest functions", [(f.num_lines, name) for f, name in named], arguments.most)
    print_most("most arguments", [(f.num_arguments, name) for f, name in named], arguments.most)
    tests = arguments.checkout.glob("tests/**/*.py")
    lengths = [
        (len(path.read_text().splitlines()), str(path.relative_to(arguments.checkout)))
        for path in tests
    ]
    print_most("longest test files", lengths, min(arguments.most, 5))


if __name__ == "__main__":
    main()
