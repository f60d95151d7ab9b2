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

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "paged_kv"

# Each module may import only from floors below its own; kernels and scheduler rooms from their own
# folder too.
TORCH_ROOMS = ("attention", "flat_attention", "quantize", "records", "score_rules", "store")
CPU_ROOMS = (
    "vectors",
    "microkernels",
    "native",
    "plan",
    "quantize",
    "threads",
    "warm_up",
    "worker",
    "attention",
    "store",
)
TRITON_ROOMS = (
    "codes",
    "rows",
    "sealed",
    "chunk",
    "open",
    "seal",
    "launch",
    "plan",
    "store",
    "attention",
)
FLOORS = [
    {"errors"}
    | {f"kernels.{room}" for room in TORCH_ROOMS}
    | {f"kernels.cpu_{room}" for room in CPU_ROOMS}
    | {f"kernels.triton_{room}" for room in TRITON_ROOMS}
    | {"kernels.xformers_attention"},
    {"backend", "blocks", "checks", "events", "jit", "memory"},
    {"sink_window", "rotary"},
    {"formats", "sampling", "token_chain", "growth", "block_tables", "prefix_cache"},
    {"block_pool", "step_plan", "swap"},
    {"block_manager"},
    {"scheduler.request", "scheduler.waiting_queue", "scheduler.scheduler", "cache", "config"},
    {"attention", "loading", "sampler", "text", "transfer"},
    {"model"},
    {"engine", "evaluate"},
    {"beam_search", "progress"},
    {"llm"},
    {"cost", "demo"},
    {"cli"},
]
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def modules() -> list[str]:
    """Every module of the package but its __init__, by dotted name."""
    paths = [*PACKAGE.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("scheduler/*.py")]
    names = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return [".".join(n[1:] if n[0] == "paged_kv" else n) for n in names if n[-1] != "__init__"]


def imported_modules(module: str) -> set[str]:
    """Our own modules that a module imports, type-checking imports left out."""
    path = (PACKAGE / module.replace(".", "/")).with_suffix(".py")
    tree = ast.parse(path.read_text())
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
        name = ".".join([*base, *(node.module or "").split(".")])
        if name.startswith("paged_kv."):
            found.add(name.removeprefix("paged_kv."))
    return found


def test_every_module_has_its_floor() -> None:
    assert set(modules()) == set(FLOOR_OF)


@pytest.mark.parametrize("module", sorted(FLOOR_OF))
def test_imports_point_down(module: str) -> None:
    for imported in imported_modules(module):
        same_folder = "." in module and imported.rpartition(".")[0] == module.rpartition(".")[0]
        assert FLOOR_OF[imported] < FLOOR_OF[module] or same_folder, f"{module} -> {imported}"


def test_kernels_import_nothing_of_ours() -> None:
    for module in FLOOR_OF:
        if module.startswith("kernels."):
            assert all(name.startswith("kernels.") for name in imported_modules(module))


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
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
    # Without an __init__.py a folder can never hide another project's package of that name.
    assert not (ROOT / folder / "__init__.py").exists()


def test_function_and_module_never_share_a_name() -> None:
    for module in FLOOR_OF:
        loaded = importlib.import_module(f"paged_kv.{module}")
        assert not hasattr(loaded, module.rpartition(".")[2])


def test_every_module_says_what_it_knows() -> None:
    for module in FLOOR_OF:
        assert importlib.import_module(f"paged_kv.{module}").__doc__, module
