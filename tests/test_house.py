"""The house itself: which way imports point, what is public, what the packages need."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from tools.house import circles, functions_of, imports_of, module_files, tree

import paged_kv
from paged_kv import code_cache

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paged_kv"
TESTS = ROOT / "tests"

# A room may import from rooms before its own, and from itself. `cache` imports kernels, `models`
# those of a model's own layers, and `benchmarks` calls and checks them.
BESIDE_KERNELS = {
    *(("cache", "kernels"), ("models", "kernels"), ("benchmarks", "kernels")),
    ("kernels", "ground"),
}
ROOMS = (
    "ground < blocks, stores < scheduler, cache < models < integrations, engine < benchmarks < "
    "entrypoints"
)
GROUND = {
    *("change", "code_cache", "errors", "free_memory", "private_folder", "units", "validation"),
    "version",
}
# Stages and deployments of other frameworks, which are made of what `entrypoints` has.
MADE_OF_ENTRYPOINTS = ("integrations.ray_data", "integrations.ray_serve")
FLOOR_OF = {
    room: number for number, rooms in enumerate(ROOMS.split(" < ")) for room in rooms.split(", ")
}


# Limits; a module over one says why, in a paragraph of its opening that begins with these words.
MOST_LINES, MOST_TEST_LINES, MOST_FUNCTION_LINES, MOST_ARGUMENTS = 500, 700, 60, 8
LONG, MANY_ARGUMENTS = "Long because", "Many arguments because"
# What is still over a limit without a reason: lists that only get shorter.
STILL_LONG_FILES: set[str] = set()
STILL_LONG_FUNCTIONS: set[str] = set()
STILL_MANY_ARGUMENTS: set[str] = set()
FILES = module_files(ROOT)
MODULES = sorted(FILES)
# What is inside another engine or framework can only be imported where that is installed.
FRAMEWORKS = {"vllm": "vllm", "ray_serve": "ray", "lmcache": "lmcache"}
IMPORTABLE = [
    module
    for module in MODULES
    if all(find_spec(package) for part, package in FRAMEWORKS.items() if part in module)
]
ARROWS = {module: imports_of(module, path, FILES) for module, path in FILES.items()}
FUNCTIONS = {module: list(functions_of(path)) for module, path in FILES.items()}


def room_of(module: str) -> str:
    if module == "__main__" or module.startswith(MADE_OF_ENTRYPOINTS):  # they lie where they must
        return "entrypoints"
    return "ground" if module in GROUND else module.partition(".")[0]


def may_import(module: str, imported: str) -> bool:
    room, other = room_of(module), room_of(imported)
    if "kernels" in (room, other):
        return room == other or (room, other) in BESIDE_KERNELS
    return room == other or FLOOR_OF[other] < FLOOR_OF[room]


def test_every_module_is_in_a_room() -> None:
    assert {room_of(module) for module in MODULES} <= {*FLOOR_OF, "kernels"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    for imported in ARROWS[module]:
        assert imported in MODULES, f"{module} imports {imported}, which is no module"
        assert may_import(module, imported), f"{module} -> {imported}"


def test_no_imports_go_in_a_circle() -> None:
    assert not circles(ARROWS)


def test_all_that_compiled_code_is_made_of_is_in_the_name_of_its_folder() -> None:
    folders = {folder.removeprefix(".") for folder in code_cache.FOLDERS_OF_SOURCES}
    waiting = {module for module in MODULES if "code_cache" in ARROWS[module]}
    seen: set[str] = set()
    while waiting - seen:
        seen |= waiting
        waiting = {imported for module in waiting for imported in ARROWS[module]}
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


@pytest.mark.parametrize(
    ("package", "public", "extra"),
    [("transformers", "LLM", "models"), ("fastapi", "create_app", "server")],
)
def test_missing_extra_is_named(
    package: str, public: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(paged_kv, "import_module", fail)
    with pytest.raises(paged_kv.PagedKVError, match=rf"pip install 'paged-kv\[{extra}\]'"):
        paged_kv.__getattr__(public)


@pytest.mark.parametrize("folder", ["kernels", "scheduler"])
def test_top_level_folders_install_through_links(folder: str) -> None:
    link = PACKAGE / folder
    if not link.is_symlink():
        pytest.skip("a checkout without links, which test_packaging is about")
    assert link.readlink() == Path("..") / folder
    # Without an __init__.py a folder can never hide another project's package of that name.
    assert not (ROOT / folder / "__init__.py").exists()


def test_function_and_module_never_share_a_name() -> None:
    for module in IMPORTABLE:
        loaded = importlib.import_module(f"paged_kv.{module}")
        assert not hasattr(loaded, module.rpartition(".")[2])


def test_every_module_says_what_it_knows() -> None:
    for module in MODULES:
        assert ast.get_docstring(ast.parse(FILES[module].read_text())), module


# -- sizes ----------------------------------------------------------------------------------------


def gives_reason(module: str, beginning: str) -> bool:
    text = ast.get_docstring(ast.parse(FILES[module].read_text())) or ""
    return any(line.startswith(beginning) for line in text.splitlines())


def test_files_are_short_or_say_why_not() -> None:
    long = {name for name, path in FILES.items() if num_lines(path) > MOST_LINES}
    assert {name for name in long if not gives_reason(name, LONG)} == STILL_LONG_FILES


def test_functions_fit_a_screen_or_their_module_says_why_not() -> None:
    long = {
        f"{module}: {function.name}"
        for module, functions in FUNCTIONS.items()
        for function in functions
        if function.num_lines > MOST_FUNCTION_LINES and not gives_reason(module, LONG)
    }
    assert long == STILL_LONG_FUNCTIONS


def test_arguments_are_few_or_their_module_says_why_not() -> None:
    """A named tuple is one argument: Triton's kernels take theirs in groups."""
    many = {
        f"{module}: {function.name}"
        for module, functions in FUNCTIONS.items()
        for function in functions
        if function.num_arguments > MOST_ARGUMENTS and not gives_reason(module, MANY_ARGUMENTS)
    }
    assert many == STILL_MANY_ARGUMENTS


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_test_files_are_short() -> None:
    long = {path.name for path in TESTS.rglob("*.py") if num_lines(path) > MOST_TEST_LINES}
    assert not long


def test_contributors_are_told_the_limits() -> None:
    told = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert (
        f"At most {MOST_LINES} lines a file, {MOST_FUNCTION_LINES} a function, {MOST_ARGUMENTS} "
        f"arguments (a named tuple counts once), {MOST_TEST_LINES} lines a test file."
    ) in told
    assert ROOMS in told


def test_what_crosses_between_blocks_cache_and_kernels_has_types() -> None:
    border = [m for m in MODULES if re.fullmatch(r"kernels\.\w+|cache\.\w+|blocks\.step_plan", m)]
    untyped = {name for name in border if re.search(r"\bAny\b", FILES[name].read_text())}
    assert not untyped


# -- folders --------------------------------------------------------------------------------------


def test_test_folders_mirror_the_rooms() -> None:
    folders = {path.name for path in TESTS.iterdir() if path.is_dir()} - {"__pycache__"}
    rooms = {room_of(module) for module in MODULES} - {"ground"}
    assert folders == rooms | {"server", "ray", "support", "soak"}
    kept_apart = [*TESTS.glob("support/**/test_*.py"), *TESTS.glob("soak/**/test_*.py")]
    assert not kept_apart, "pytest collects tests from the rooms' folders"


def test_measurements_import_no_tests() -> None:
    for path in (ROOT / "bench").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) tests\b", path.read_text(), re.MULTILINE), path


def test_the_list_of_all_files_is_true() -> None:
    written = (ROOT / "docs" / "structure.md").read_text()
    assert written == tree(ROOT), "`make structure` writes it anew"
    for path in [*FILES.values(), *TESTS.rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        assert f"`{path.name}`: " in written or path.name == "conftest.py", path
