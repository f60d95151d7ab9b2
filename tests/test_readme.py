"""What the README shows is true: its example runs, its numbers are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from paged_kv import FORMATS, LayerSpec
from paged_kv.models.cost import format_costs
from paged_kv.scheduler.admission import MAX_TIMES_PASSED
from paged_kv.scheduler.request import AGING_STEPS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_embedding_example_runs() -> None:
    example = re.search(r"```python\n(import numpy.*?)```", README, re.DOTALL)
    assert example is not None
    names: dict[str, object] = {}
    exec(example[1], names)
    outputs = names["out"]
    assert isinstance(outputs, list)
    assert [tuple(output.shape) for output in outputs] == [(700, 8, 64)] * 4
    assert all(output.isfinite().all() for output in outputs)


def test_embedding_example_is_short() -> None:
    example = re.search(r"```python\n(import numpy.*?)```", README, re.DOTALL)
    assert example is not None
    statements = [line for line in example[1].splitlines() if line and "import" not in line]
    assert len(statements) <= 8


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


def test_every_named_benchmark_exists() -> None:
    pages = [README, *(page.read_text() for page in (ROOT / "docs").glob("*.md"))]
    named = {name for page in pages for name in re.findall(r"\b(?:bench|train)_\w+\.py", page)}
    assert named
    assert all(any((ROOT / "bench").rglob(name)) for name in named)


def test_numbers_are_those_of_the_code() -> None:
    words = " ".join(README.split())
    serving_loop = (ROOT / "examples" / "embed.py").read_text().splitlines()
    assert f"a whole serving loop around a toy model in {len(serving_loop)} lines" in words
    assert f"a level of priority is worth {AGING_STEPS} steps of waiting" in words
    assert f"does not fit may be passed by {MAX_TIMES_PASSED} that do" in words
