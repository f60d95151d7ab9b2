"""The house itself: which way imports point, what is public, what the packages need."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import paged_kv
from paged_kv import code_cache

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paged_kv"

# A room may import from rooms before its own, and from itself. Only `cache` imports kernels.
ROOMS = "ground < blocks < scheduler, cache < models < engine < entrypoints"
GROUND = {"code_cache", "errors", "units", "validation"}
FLOOR_OF = {
    room: number for number, rooms in enumerate(ROOMS.split(" < ")) for room in rooms.split(", ")
}


def modules() -> list[str]:
    """Every module of the package but the __init__ ones, by dotted name."""
    paths = [*PACKAGE.rglob("*.py"), *ROOT.glob("kernels/**/*.py"), *ROOT.glob("scheduler/*.py")]
    names = {path.relative_to(ROOT).with_suffix("").parts for path in paths}
    names = {name[1:] if name[0] == "paged_kv" else name for name in names}
    return sorted(".".join(name) for name in names if name[-1] != "__init__")


MODULES = modules()


def path_of(module: str) -> Path:
    """The file of a module; not through the links, which some checkouts cannot have."""
    base = ROOT if module.partition(".")[0] in ("kernels", "scheduler") else PACKAGE
    return (base / module.replace(".", "/")).with_suffix(".py")


def room_of(module: str) -> str:
    return "ground" if module in GROUND else module.partition(".")[0]


def imported_modules(module: str) -> set[str]:
    """Our own modules that a module imports, type-checking imports left out."""
    tree = ast.parse(path_of(module).read_text())
    folder = ["paged_kv", *module.split(".")[:-1]]
    found: set[str] = set()
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in skipped:
            continue
        base = folder[: len(folder) - node.level + 1] if node.level else []
        name = ".".join([*base, *filter(None, (node.module or "").split("."))])
        if name.startswith("paged_kv"):
            name = name.removeprefix("paged_kv").removeprefix(".")
            is_module = name in MODULES
            found |= {name} if is_module else {f"{name}.{alias.name}" for alias in node.names}
    return found


def may_import(module: str, imported: str) -> bool:
    room, other = room_of(module), room_of(imported)
    if "kernels" in (room, other):
        return room == other or (room, other) in (("cache", "kernels"), ("kernels", "ground"))
    return room == other or FLOOR_OF[other] < FLOOR_OF[room]


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in MODULES} <= {*FLOOR_OF, "kernels"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for imported in imported_modules(module):
        assert imported in MODULES, f"{module} imports {imported}, which is no module"
        assert may_import(module, imported), f"{module} -> {imported}"


def test_no_imports_go_in_a_circle() -> None:
    waiting = {module: imported_modules(module) for module in MODULES}
    while waiting:
        free = {module for module, needed in waiting.items() if not needed & waiting.keys()}
        assert free, f"these import each other: {sorted(waiting)}"
        waiting = {module: needed for module, needed in waiting.items() if module not in free}


def test_all_that_compiled_code_is_made_of_is_in_the_name_of_its_folder() -> None:
    folders = {folder.removeprefix(".") for folder in code_cache.FOLDERS_OF_SOURCES}
    waiting = {module for module in MODULES if "code_cache" in imported_modules(module)}
    seen: set[str] = set()
    while waiting - seen:
        seen |= waiting
        waiting = {imported for module in waiting for imported in imported_modules(module)}
    assert {"blocks.growth", "kernels.cpu.vectors", "code_cache"} <= seen
    assert {module.rpartition(".")[0] for module in seen} <= folders


def loaded_packages(statement: str) -> set[str]:
    """Top-level packages in memory after a statement, in a new interpreter."""
    script = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return {name.partition(".")[0] for name in json.loads(output)}


def test_manager_and_scheduler_need_no_torch() -> None:
    loaded = loaded_packages("from paged_kv import BlockManager, KVFormat, Request, Scheduler")
    assert "numpy" in loaded
    assert "torch" not in loaded


def test_cache_and_attention_need_no_transformers() -> None:
    loaded = loaded_packages("from paged_kv import PagedKVCache, paged_attention")
    assert "torch" in loaded
    assert not loaded & {"transformers", "tokenizers", "rich", "triton"}


def test_public_names_are_exactly_all() -> None:
    for name in paged_kv.__all__:
        value = getattr(paged_kv, name)
        named = getattr(value, "__name__", None) or getattr(value, "name", name).upper()
        assert named == name
    assert dir(paged_kv) == sorted(paged_kv.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        paged_kv.nothing  # noqa: B018 -- the access itself is what is tested


def test_every_public_object_says_what_it_is() -> None:
    for name in paged_kv.__all__:
        assert getattr(paged_kv, name).__doc__, name


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, package: str | None = None) -> None:
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.setattr(paged_kv, "import_module", fail)
    with pytest.raises(paged_kv.PagedKVError, match=r"pip install 'paged-kv\[models\]'"):
        paged_kv.__getattr__("LLM")


@pytest.mark.parametrize("folder", ["kernels", "scheduler"])
def test_top_level_folders_install_through_links(folder: str) -> None:
    link = PACKAGE / folder
    if not link.is_symlink():
        pytest.skip("a checkout without links, which test_packaging is about")
    assert link.readlink() == Path("..") / folder
    # Without an __init__.py a folder can never hide another project's package of that name.
    assert not (ROOT / folder / "__init__.py").exists()


def test_function_and_module_never_share_a_name() -> None:
    for module in MODULES:
        loaded = importlib.import_module(f"paged_kv.{module}")
        assert not hasattr(loaded, module.rpartition(".")[2])


def test_every_module_says_what_it_knows() -> None:
    for module in MODULES:
        assert importlib.import_module(f"paged_kv.{module}").__doc__, module
