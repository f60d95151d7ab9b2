"""Figures in README.md and docs/ that follow from the code are the code's.

Those that were measured are `test_results.py`'s. A figure is looked for in all documents together
where it does not matter in which it stands.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch

from paged_kv import FORMATS, LayerSpec
from paged_kv.models.cost import format_costs
from paged_kv.scheduler.admission import MAX_TIMES_PASSED
from paged_kv.scheduler.request import AGING_STEPS
from tests.support.documents import ROOT, paths

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Lines of the example of embedding, imports left out: from the cache to the end of its sequences.
MOST_STATEMENTS = 17


@cache
def all_words() -> str:
    """All documents as one line."""
    return " ".join(" ".join((ROOT / page).read_text(encoding="utf-8").split()) for page in paths())


@pytest.mark.parametrize("name", FORMATS)
def test_formats_table_is_what_the_code_computes(name: str) -> None:
    layer = LayerSpec(kv_format=FORMATS["native"], num_kv_heads=1, key_dim=128, value_dim=128)
    costs = {c.name: c for c in format_costs([layer], torch.bfloat16, (1024, 4096, 32768))}
    cost, native = costs[name], costs["native"]
    smaller = native.bytes_per_token / cost.bytes_per_token
    effective = " / ".join(
        f"{native.effective[n] / cost.effective[n]:.2f}x" for n in cost.effective
    )
    assert re.search(
        rf"^\| `{name}`[^|]*\| {cost.bytes_per_token:.0f} \| {smaller:.2f}x \| {effective} \|$",
        README,
        re.MULTILINE,
    )


def test_embedding_example_is_short() -> None:
    page = (ROOT / "docs" / "embedding.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(import numpy.*?)```", page, re.DOTALL)
    assert example is not None
    statements = [line for line in example[1].splitlines() if line and "import" not in line]
    assert len(statements) <= MOST_STATEMENTS


def test_every_named_benchmark_exists() -> None:
    named = re.findall(r"\b(?:bench|train)_\w+\.py", all_words())
    assert named
    folders = (ROOT / "bench", ROOT / "paged_kv" / "entrypoints")
    missing = [name for name in named if not any(any(each.rglob(name)) for each in folders)]
    assert not missing


def test_every_named_file_of_results_exists() -> None:
    for name in re.findall(r"bench/results/[\w.]+\.(?:json|md)\b", all_words()):
        assert (ROOT / name).is_file(), name


def test_numbers_are_those_of_the_code() -> None:
    words = all_words()
    serving_loop = (ROOT / "examples" / "embed.py").read_text().splitlines()
    assert f"a whole serving loop around a toy model in {len(serving_loop)} lines" in words
    assert f"[{len(serving_loop)} lines](examples/embed.py) serve a toy model" in words
    assert f"a level of priority is worth {AGING_STEPS} steps of waiting" in words
    assert f"Priorities age by {AGING_STEPS} steps a level" in words
    assert f"does not fit may be passed by {MAX_TIMES_PASSED} that do" in words
