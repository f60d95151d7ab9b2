"""The shipped model: what it is, and how little the quantized formats change what it says."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_kv import INT2, INT4, INT8, LLM, NATIVE, KVFormat, SamplingParams
from paged_kv.engine.evaluate import Quality, compare_formats
from paged_kv.entrypoints.cli import main
from paged_kv.entrypoints.demo import MODEL_FOLDER, demo_prompts
from paged_kv.models.huggingface import PagedModel

EXCERPT = Path(__file__).parents[1] / "support" / "data" / "persuasion-excerpt.txt"
NUM_WINDOWS = 6
FAITHFUL_INT2 = INT2.with_options(
    key_clip=1.0, value_clip=1.0, num_sink_tokens=0, min_tail_tokens=0
)
CASES: dict[str, KVFormat] = {
    "native": NATIVE,
    "int8": INT8,
    "int4": INT4,
    "int2": INT2,
    "int2 without head, tail and clip": FAITHFUL_INT2,
}


@pytest.fixture(scope="module")
def qualities() -> dict[str, Quality]:
    """Every case teacher-forced on held-out windows of 1024 tokens, 32 tokens a step."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER, model_max_length=1 << 30)
    text = " ".join(EXCERPT.read_text().split())
    ids = tokenizer.encode(text, add_special_tokens=False)
    body = np.array(ids[: NUM_WINDOWS * 1023]).reshape(NUM_WINDOWS, 1023)
    windows = np.insert(body, 0, tokenizer.bos_token_id, axis=1)
    model = PagedModel(AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32))
    results = compare_formats(model, list(CASES.values()), windows, tokens_per_step=32)
    return dict(zip(CASES, results, strict=True))


def test_the_model_is_small_and_grouped() -> None:
    size = sum(path.stat().st_size for path in MODEL_FOLDER.iterdir())
    assert size <= 8e6
    config = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER).config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 64)
    assert config.max_position_embeddings >= 1024


def test_native_perplexity_is_that_of_a_trained_model(qualities: dict[str, Quality]) -> None:
    vocabulary = 2048
    assert qualities["native"].perplexity < vocabulary / 40


@pytest.mark.parametrize(("case", "percent"), [("int8", 0.1), ("int4", 1.0), ("int2", 2.0)])
def test_perplexity_stays_near_native(
    case: str, percent: float, qualities: dict[str, Quality]
) -> None:
    ratio = qualities[case].perplexity / qualities["native"].perplexity
    assert abs(math.log(ratio)) < percent / 100


def test_divergence_grows_as_bits_shrink(qualities: dict[str, Quality]) -> None:
    assert qualities["native"].divergence == 0.0
    assert qualities["int8"].divergence < qualities["int4"].divergence / 5
    assert qualities["int4"].divergence < qualities["int2"].divergence / 5


def test_head_tail_and_clip_are_what_makes_two_bits_good(qualities: dict[str, Quality]) -> None:
    """The control that justifies the design: KIVI without them strays at least twice as far."""
    control = qualities["int2 without head, tail and clip"]
    assert control.divergence > 2 * qualities["int2"].divergence
    assert control.agreement < qualities["int2"].agreement


def test_greedy_tokens_equal_generate() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    prompts = [tokenizer.encode(prompt * n) for n, prompt in enumerate(demo_prompts()[:8], start=1)]
    expected = [
        model.generate(torch.tensor([p]), max_new_tokens=48, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    for settings in ({}, {"token_budget": 48}, {"token_budget": 48, "num_blocks": 24}):
        with LLM(model, kv_format="native", max_num_seqs=8, **settings) as llm:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=48))
            assert [output.token_ids for output in outputs] == expected
            assert llm.memory_stats().allocated == 0


def test_talks_are_written_as_novels_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    messages = [
        {"role": "system", "content": "A ship, at night."},
        {"role": "user", "content": "Is the captain in?"},
        {"role": "assistant", "content": "He is not."},
        {"role": "user", "content": "When is he?"},
    ]
    talk = '<|bos|>A ship, at night.\n\n"Is the captain in?"\n\n"He is not."\n\n"When is he?"\n\n"'
    with LLM(MODEL_FOLDER, max_num_seqs=2) as llm:
        chat, text = llm.generate([messages, talk], SamplingParams(max_tokens=8))
    assert (
        chat.prompt_token_ids
        == text.prompt_token_ids
        == tokenizer.encode(talk, add_special_tokens=False)
    )
    assert chat.token_ids == text.token_ids
    command = ("generate", "--chat", "Is the captain in?", "--max-tokens", "4")
    assert main(command) == 0
    assert capsys.readouterr().out.strip()


def test_demo_prompts_are_32_different_ones() -> None:
    assert len(set(demo_prompts())) == 32
