"""A job of Ray Data with vLLM and our plugin as its stage: JSON lines in, JSON lines out."""

from __future__ import annotations

import json

import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from transformers import AutoTokenizer

from tests.support.vllm_job import MODEL, own_rounds

NUM_ROWS, NUM_NEW = 6, 64


def test_rows_get_what_our_own_engine_gives_and_the_log_says_the_format(cluster, tmp_path):
    rows = [
        {"id": number, "prompt": f"Once upon a time there were {number} cats"}
        for number in range(NUM_ROWS)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.checkpoint_config = CheckpointConfig("id", str(tmp_path / "checkpoint"))
    config = vLLMEngineProcessorConfig(
        model_source=MODEL,
        engine_kwargs={
            "attention_backend": "CUSTOM",
            "additional_config": {"paged_kv": {"format": "int2"}},
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
        },
        placement_group_config={"bundles": [{"CPU": 1}]},
        batch_size=NUM_ROWS,
        chat_template_stage=False,
    )
    sampling = {"max_tokens": NUM_NEW, "temperature": 0, "ignore_eos": True}
    processor = build_processor(
        config,
        preprocess=lambda row: {"prompt": row["prompt"], "sampling_params": sampling},
        postprocess=lambda row: {"id": row["id"], "text": row["generated_text"]},
    )
    processor(ray.data.read_json(str(tmp_path / "rows.jsonl"))).write_json(
        str(tmp_path / "results")
    )

    files = (tmp_path / "results").glob("*.json")
    results = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    found = {result["id"]: result["text"] for result in results}
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    expected = map(tokenizer.decode, own_rounds(prompts, "int2")[0])
    assert found == dict(enumerate(expected))
    logs = [path.read_text(errors="replace") for path in cluster.glob("worker-*")]
    assert any("paged_kv: format int2, 84.0 bytes a token and layer" in log for log in logs)
