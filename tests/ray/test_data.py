"""A job of Ray Data with our `LLM` as its stage: every row has its result, also after a fault."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

import paged_kv
from paged_kv import ConfigError, SamplingParams
from paged_kv.integrations.ray_data import LLMStage

MODEL = paged_kv.DEMO_MODEL
OPTIONS = {"kv_format": "int2", "kv_memory": "32MiB", "max_model_len": 512, "num_threads": 1}
DEFAULTS = SamplingParams(temperature=0, max_tokens=8)
NUM_ROWS, BATCH = 24, 4
BAD = 7  # of the rows


def row(number: int) -> dict[str, Any]:
    if number == BAD:
        return {"id": number, "prompt": "Once", "temperature": -1.0}
    prompt = f"Once upon a time there were {number} cats"
    return {"id": number, "prompt": prompt, "note": "kept", "max_tokens": 4 + number % 3}


class StageThatFails(LLMStage):
    """Notes the rows that it serves; fails at the fourth batch, until it is mended.

    Not before Ray has written what one of the others gave.
    """

    def __init__(self, folder: str, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.folder = Path(folder)

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        with (self.folder / "served").open("a") as file:
            file.write("".join(f"{number}\n" for number in table["id"].to_pylist()))
        if len(served(self.folder)) > 3 * BATCH and not (self.folder / "mended").exists():
            while not is_written(self.folder):
                time.sleep(0.05)
            raise RuntimeError("the stage fails")
        return super().__call__(table)


def served(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "served").read_text().split()]


def is_written(folder: Path) -> bool:
    """Whether any batch is, and is known to be."""
    known = (folder / "checkpoint").glob("*.parquet")
    return any(not path.stem.endswith(".pending") for path in known)


def run(folder: Path) -> None:
    """The job, as its user would start it again."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig("id", str(folder / "checkpoint"))
    rows = ray.data.read_json(str(folder / "rows.jsonl"), override_num_blocks=NUM_ROWS // BATCH)
    rows.map_batches(
        StageThatFails,
        fn_constructor_args=[str(folder), str(MODEL), DEFAULTS],
        fn_constructor_kwargs=OPTIONS,
        batch_format="pyarrow",
        batch_size=BATCH,
        compute=ActorPoolStrategy(size=1),
        num_cpus=1,
    ).write_json(str(folder / "results"))


def results(folder: Path) -> list[dict[str, Any]]:
    files = (folder / "results").glob("*.json")
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_job_that_failed_goes_on_and_no_row_is_served_for_nothing(cluster, tmp_path):
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(NUM_ROWS))
    (tmp_path / "rows.jsonl").write_text(lines)
    with pytest.raises(Exception, match="the stage fails"):
        run(tmp_path)
    done = {result["id"] for result in results(tmp_path)}
    assert 0 < len(done) < NUM_ROWS
    before = len(served(tmp_path))
    (tmp_path / "mended").touch()
    run(tmp_path)
    assert sorted(served(tmp_path)[before:]) == sorted(set(range(NUM_ROWS)) - done)
    found = sorted(results(tmp_path), key=lambda result: result["id"])
    assert [result["id"] for result in found] == list(range(NUM_ROWS))
    bad = found.pop(BAD)
    assert "temperature" in bad["error"]
    assert bad.get("text") is None
    with paged_kv.LLM(MODEL, **OPTIONS) as llm:
        params = [SamplingParams(temperature=0, max_tokens=one["max_tokens"]) for one in found]
        expected = llm.generate([one["prompt"] for one in found], params)
    assert [one["text"] for one in found] == [one.completions[0].text for one in expected]
    assert {one["note"] for one in found} == {"kept"}


@pytest.fixture(scope="module")
def stage() -> LLMStage:
    return LLMStage(str(MODEL), DEFAULTS, **OPTIONS)


def test_rows_of_one_table_ask_for_different_things(stage):
    """Arrow gives every row every field: those that it does not have are null."""
    rows = [
        {"prompt": "Once upon a time", "stop": [" "]},
        {"prompt": "Once upon a time", "logit_bias": {"5": 100.0}, "max_tokens": 3},
        {"messages": [{"role": "user", "content": "Hello"}]},
        {"prompt": "Once", "messages": [{"role": "user", "content": "Hello"}]},
        {"prompt": "Once", "n": 2},
        {"note": "neither"},
    ]
    found = stage(pyarrow.Table.from_pylist(rows, schema=schema_of(rows))).to_pylist()
    assert found[0]["text"].strip() == found[0]["text"]
    assert (found[1]["num_tokens"], found[1]["finish_reason"]) == (3, "length")
    assert found[1]["text"] == stage.llm.tokenizer.decode([5, 5, 5])
    errors = [one["error"] for one in found]
    assert errors[:3] == [None, None, None]
    assert found[2]["num_tokens"] > 0
    assert errors[3] == errors[5] == 'a row needs either "prompt" or "messages"'
    assert "no n" in errors[4]


def schema_of(rows: list[dict[str, Any]]) -> pyarrow.Schema:
    return pyarrow.unify_schemas([pyarrow.Table.from_pylist([one]).schema for one in rows])


def test_what_is_no_table_or_has_our_columns_is_refused(stage):
    with pytest.raises(ConfigError, match=r'got dict: batch_format="pyarrow"'):
        stage({"prompt": ["Once"]})
    with pytest.raises(ConfigError, match="a column 'text'"):
        stage(pyarrow.table({"prompt": ["Once"], "text": ["mine"]}))
