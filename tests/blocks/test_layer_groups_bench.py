"""The benchmark of groups of layers works without vLLM, and counts what arithmetic says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_layer_groups
import pytest
from peers import vllm_manager


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    file: Path = tmp_path_factory.mktemp("bench") / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_manager, "is_available", lambda: False)
        patch.setattr(vllm_manager, "why_not", lambda: "hidden from this test")
        patch.setattr("sys.argv", ["bench_layer_groups.py", "--quick", "--json", str(file)])
        bench_layer_groups.main()
    found = json.loads(file.read_text())["rows"]
    return {(row["case"], row["metric"]): row for row in found}


@pytest.mark.parametrize("model", bench_layer_groups.MODELS, ids=lambda model: model.name)
def test_native_groups_hold_what_their_layers_see(
    rows: dict[tuple[str, str], dict[str, Any]], model: bench_layer_groups.Model
) -> None:
    for num_tokens in bench_layer_groups.QUICK.lengths:
        row = rows[f"{model.name}, {num_tokens} tokens", "layer blocks, native"]
        seen = sum(min(num_tokens, window or num_tokens) for window in model.windows)
        assert row["value"] == seen // 16 * model.group_size
        assert row["baseline_value"] == num_tokens // 16 * model.num_layers
        assert row["value"] >= model.least_layer_blocks(num_tokens)


def test_prompts_hit_and_steps_are_timed(rows: dict[tuple[str, str], dict[str, Any]]) -> None:
    for model in bench_layer_groups.MODELS:
        for num_blocks in bench_layer_groups.QUICK.pools:
            row = rows[f"{model.name}, pool of {num_blocks} blocks", "hit rate"]
            assert 0 < row["value"] < 1
    for shape in bench_layer_groups.SHAPES:
        case = f"decode step of {bench_layer_groups.QUICK.num_seqs}, {shape}"
        assert rows[case, "reserve + commit, native"]["value"] > 0
        assert rows[case, "with append, int8"]["baseline"] is None
