"""`PagedCache` in transformers' `generate()`: in native the tokens of a `DynamicCache`, always."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from paged_kv import (
    LLM,
    ConfigError,
    InvalidRequestError,
    OutOfBlocksError,
    PagedCache,
    PagedKVError,
    UnsupportedModelError,
)
from paged_kv.cache.formats import FORMATS
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.integrations.sequence_pool import PoolSettings
from paged_kv.models.calibration import calibrate
from paged_kv.models.huggingface import PagedModel
from tests.support import zoo
from tests.support.random_models import save_model

LENGTHS = (131, 40, 97)
ARCHITECTURES = [
    *("llama", "qwen2-window", "gemma2", "gemma3", "gpt2", "gpt-neox", "phi3-window", "opt"),
    *("cohere2", "deepseek-v3", "llama4", "gpt-oss", "mixtral"),
]
BEAMS = {"num_beams": 4, "num_return_sequences": 3}
SAMPLES = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7, "top_k": 20}


every_route = pytest.mark.parametrize("fused", [False, True], ids=["gather", "fused"])


@contextmanager
def attention(model: PreTrainedModel, *, fused: bool) -> Iterator[None]:
    """Let a model's attention read blocks, or have it as it is."""
    own = model.config._attn_implementation
    if fused:
        model.set_attn_implementation("paged_kv")
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class Poisoned(PoolSettings):
    """Blocks that are full of NaN."""

    def new_cache(self, batch_size: int) -> PagedKVCache:
        cache = super().new_cache(batch_size)
        for arena in cache.arenas:
            arena.fill_(0xFF)
        return cache


def open_cache(
    model: PreTrainedModel, kv_format: str = "native", *, fused: bool = False, **settings: Any
) -> PagedCache:
    """A cache whose blocks are full of NaN: reading what was never written shows."""
    with attention(model, fused=fused):
        cache = PagedCache(model, kv_format, **settings)
    cache._batch.settings = Poisoned(**vars(cache._batch.settings))
    return cache


def check(cache: PagedCache) -> None:
    """The manager's invariants hold, and every sequence stores as many tokens as it should."""
    batch = cache._batch
    assert batch.pool is not None
    manager = batch.pool.manager
    manager.check_integrity()
    if batch._step is None:
        stored = manager.num_computed_tokens[batch._seq_ids]
        assert stored.tolist() == batch._is_stored.sum(1).tolist()
        assert len(manager.living_seq_ids) == batch.batch_size


def batch_of(lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Prompts of these lengths, padded on the left."""
    prompts, width = zoo.prompts(lengths), max(lengths)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def prompt_of(length: int = 131) -> dict[str, Tensor]:
    return {"input_ids": batch_of((length,))["input_ids"]}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, **options}
    with attention(model, fused=is_fused(options.get("past_key_values"))):
        tokens: Tensor = model.generate(**inputs, **settings)
    return tokens


def is_fused(cache: Any) -> bool:
    return isinstance(cache, PagedCache) and cache._batch.attends


def both(
    model: PreTrainedModel, inputs: dict[str, Tensor], cache: PagedCache, **options: Any
) -> tuple[Tensor, Tensor]:
    """Tokens with a `DynamicCache` and with this one."""
    expected = generate(model, inputs, past_key_values=DynamicCache(config=model.config), **options)
    return expected, generate(model, inputs, past_key_values=cache, **options)


# -- the same tokens ------------------------------------------------------------------------------


@every_route
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_native_tokens_of_a_padded_batch_are_those_of_a_dynamic_cache(name, fused):
    model = zoo.model(name)
    if fused and name == "deepseek-v3":  # it stores what its keys are computed from
        with pytest.raises(UnsupportedModelError, match="attends to other keys than it stores"):
            open_cache(model, fused=True)
        return
    cache = open_cache(model, fused=fused)
    expected, tokens = both(model, batch_of(), cache)
    assert tokens.equal(expected)
    assert cache.get_seq_length() == expected.shape[1] - 1
    check(cache)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "paged_kv"])
@pytest.mark.parametrize("options", [{}, BEAMS, SAMPLES], ids=["greedy", "beams", "samples"])
def test_however_tokens_are_chosen(options, implementation):
    fused = implementation == "paged_kv"
    own = "sdpa" if fused else implementation
    model = zoo.build("LlamaForCausalLM", attn_implementation=own)
    cache = open_cache(model, fused=fused)
    for inputs in (prompt_of(), batch_of()):
        expected, tokens = both(model, inputs, cache, **options)
        assert tokens.equal(expected)
        check(cache)
        cache.reset()
        assert cache.get_seq_length() == 0


def test_beams_share_the_blocks_of_their_prompt():
    model = zoo.model("llama")
    cache = open_cache(model)
    generate(model, prompt_of(), past_key_values=cache, num_beams=4, max_new_tokens=20)
    alone = open_cache(model)
    generate(model, prompt_of(), past_key_values=alone, max_new_tokens=20)
    assert cache.memory_stats().allocated <= 2 * alone.memory_stats().allocated


@every_route
@pytest.mark.parametrize("kv_format", ["native", "int8"])
def test_prompt_lookup_takes_drafts_back(kv_format, fused):
    """Tokens that repeat give drafts, some of which are right; none is ever sealed."""
    model = zoo.model("llama")
    inputs = {"input_ids": prompt_of(17)["input_ids"].repeat(1, 6)}
    cache, plain = (open_cache(model, kv_format, fused=fused) for _ in range(2))
    options = {"max_new_tokens": 60, "prompt_lookup_num_tokens": 4}
    expected, tokens = both(model, inputs, cache, **options)
    if kv_format == "native":
        assert tokens.equal(expected)
    check(cache)
    cache.crop(0)
    check(cache)
    plain_tokens = generate(model, inputs, past_key_values=plain, max_new_tokens=60)
    if kv_format == "native":
        assert plain_tokens.equal(expected)


@every_route
def test_assisted_decoding(fused):
    model = zoo.model("llama")
    assistant = zoo.build("LlamaForCausalLM", num_hidden_layers=1)
    cache = open_cache(model, fused=fused)
    expected, tokens = both(model, prompt_of(), cache, assistant_model=assistant)
    assert tokens.equal(expected)
    check(cache)


@every_route
def test_turns_on_one_cache_and_one_token_prompts(fused):
    model, cache = zoo.model("llama"), open_cache(zoo.model("llama"), fused=fused)
    dynamic = DynamicCache(config=model.config)
    texts = [prompt_of(5)["input_ids"], prompt_of(5)["input_ids"]]
    for turn in ([7], [9, 8, 7] * 20, [3]):
        new = torch.tensor([turn])
        for number, past in enumerate((dynamic, cache)):
            text = torch.cat([texts[number], new], 1)
            texts[number] = generate(model, {"input_ids": text}, past_key_values=past)
        assert texts[0].equal(texts[1])
        assert cache.get_seq_length() == dynamic.get_seq_length() == texts[0].shape[1] - 1
        check(cache)


@every_route
def test_turns_of_a_batch_with_padding_between_them(fused):
    model, cache = zoo.model("llama"), open_cache(zoo.model("llama"), fused=fused)
    dynamic = DynamicCache(config=model.config)
    first = batch_of()
    outputs = [generate(model, first, past_key_values=past) for past in (dynamic, cache)]
    assert outputs[0].equal(outputs[1])
    second = batch_of((30, 64, 5))
    mask = torch.ones_like(outputs[0])
    mask[:, : first["input_ids"].shape[1]] = first["attention_mask"]
    inputs = {
        "input_ids": torch.cat([outputs[0], second["input_ids"]], 1),
        "attention_mask": torch.cat([mask, second["attention_mask"]], 1),
    }
    # The last token of a turn is not in the cache: padding may follow it, which is stored nowhere.
    for past in (dynamic, cache):
        outputs.append(generate(model, inputs, past_key_values=past))
    assert outputs[2].equal(outputs[3])
    check(cache)
    stored = cache._batch._is_stored.sum(1)
    assert stored.tolist() == [131 + 24 + 30 + 23, 40 + 24 + 64 + 23, 97 + 24 + 5 + 23]


@every_route
def test_a_prompt_in_chunks(fused):
    model = zoo.model("llama")
    cache = open_cache(model, fused=fused)
    expected, tokens = both(model, batch_of(), cache, prefill_chunk_size=33)
    assert tokens.equal(expected)
    check(cache)


@every_route
@pytest.mark.parametrize("kv_format", ["native", "int8"])
def test_a_copy_goes_on_by_itself(kv_format, fused):
    """What transformers' own documentation does to use a prompt's cache more than once."""
    model = zoo.model("llama")
    prompt = prompt_of()["input_ids"]
    cache = filled(model, open_cache(model, kv_format, fused=fused), {"input_ids": prompt})
    before = cache.memory_stats()
    outputs = []
    for end in ([5, 6], [7], [5, 6]):
        copied = copy.deepcopy(cache)
        text = {"input_ids": torch.cat([prompt, torch.tensor([end])], 1)}
        outputs.append(generate(model, text, past_key_values=copied))
        check(copied)
        if kv_format == "native":
            assert outputs[-1].equal(generate(model, text))
    assert outputs[0].equal(outputs[2])
    assert cache.memory_stats() == before
    assert cache.get_seq_length() == 131


@every_route
def test_half_precision(fused):
    model = zoo.build("LlamaForCausalLM", initializer_range=0.05).to(torch.bfloat16)
    inputs = batch_of()
    expected = logits_of(model, inputs, DynamicCache(config=model.config)).float()
    cache = open_cache(model, fused=fused)
    logits = logits_of(model, inputs, cache).float()
    assert logits.equal(expected) or fused
    assert float((logits - expected).norm() / expected.norm()) < 0.03


# -- quantized ------------------------------------------------------------------------------------


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor], cache: Any) -> Tensor:
    """Of the last 16 tokens, given one by one after all others."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = []
    edges = [0, *range(ids.shape[1] - 16, ids.shape[1] + 1)]
    for start, end in pairwise(edges):
        with torch.no_grad(), attention(model, fused=is_fused(cache)):
            logits = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
        found.append(logits[:, -1])
    return torch.stack(found[1:], 1)


LIMITS = {"int8": 0.02, "int8-token": 0.04, "int4": 0.12, "int3": 0.2, "k4v2": 0.3}


@every_route
@pytest.mark.parametrize(
    "kv_format", [*(name for name in FORMATS if name != "native"), "int2,0=native,2=int4"]
)
def test_quantized_logits_differ_by_little(kv_format, fused):
    model = zoo.build("LlamaForCausalLM", initializer_range=0.05)
    inputs = batch_of((300, 222, 290))
    expected = logits_of(model, inputs, DynamicCache(config=model.config))
    cache = open_cache(model, kv_format, fused=fused)
    logits = logits_of(model, inputs, cache)
    error = float((logits - expected).norm() / expected.norm())
    assert 0 < error < LIMITS.get(kv_format, 0.5)
    assert cache.memory_stats().body > 0
    check(cache)


def test_a_calibration_is_of_the_model_and_makes_int2_better(tmp_path):
    model = zoo.build("LlamaForCausalLM", initializer_range=0.05)
    paged = PagedModel(model)
    known = calibrate(paged, [token for prompt in zoo.prompts() for token in prompt])
    paged.close()
    known.save(tmp_path / "calibration")
    inputs = batch_of((300, 222, 290))
    expected = logits_of(model, inputs, DynamicCache(config=model.config))
    errors = []
    for calibration in (None, known, tmp_path / "calibration"):
        cache = open_cache(model, "int2", calibration=calibration)
        errors.append(float((logits_of(model, inputs, cache) - expected).norm()))
    assert errors[1] == errors[2]
    assert errors[1] < errors[0]
    with pytest.raises(ConfigError, match="made for another model"):
        PagedCache(zoo.model("llama"), "int2", calibration=known)


def test_padding_is_not_stored():
    """So that the first tokens of a short prompt, not its padding, stay in full precision."""
    model = zoo.model("llama")
    cache, alone = open_cache(model, "int4"), open_cache(model, "int4")
    inputs = batch_of((150, 40))
    short = {"input_ids": inputs["input_ids"][1:, -40:]}
    generate(model, inputs, past_key_values=cache, max_new_tokens=2)
    generate(model, short, past_key_values=alone, max_new_tokens=2)
    batch, other = cache._batch, alone._batch
    assert batch.pool is not None
    assert other.pool is not None
    assert batch.pool.manager.num_computed_tokens[batch._seq_ids].tolist() == [151, 41]
    head, expected = (
        each.pool.cache.records[0].open_keys[int(each.pool.manager.block_ids(seq_id)[0])]
        for each, seq_id in ((batch, int(batch._seq_ids[1])), (other, int(other._seq_ids[0])))
    )
    torch.testing.assert_close(head, expected, rtol=0, atol=0.02)


# -- rows and positions ---------------------------------------------------------------------------


def states_of(cache: Any) -> tuple[Tensor, Tensor]:
    """All keys and values that the first layer holds, read by a step that is thrown away."""
    if isinstance(cache, DynamicCache):
        layer = cache.layers[0]
        assert layer.keys is not None
        assert layer.values is not None
        return layer.keys, layer.values
    copied = copy.deepcopy(cache)
    size = copied._batch.batch_size
    keys, values = copied.update(torch.zeros(size, 2, 1, 16), torch.zeros(size, 2, 1, 16), 0)
    return keys[:, :, :-1], values[:, :, :-1]


def feed(cache: PagedCache, keys: Tensor, values: Tensor) -> None:
    """A forward pass in which every layer has the same new keys and values."""
    for layer in range(len(cache)):
        cache.update(keys, values, layer)


def cropped_states(cache: PagedCache, length: int) -> tuple[Tensor, Tensor]:
    """Of the first positions; the others are taken back."""
    cache.crop(length - cache.get_seq_length())
    return states_of(cache)


def filled(model: PreTrainedModel, cache: Any, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad(), attention(model, fused=is_fused(cache)):
        model(**inputs, past_key_values=cache)
    return cache


CHANGES = {
    "crop": lambda cache: cache.crop(-7),
    "crop much": lambda cache: cache.crop(-100),
    "crop nothing": lambda cache: cache.crop(0),
    "crop everything": lambda cache: cache.crop(-1000),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    "repeat": lambda cache: cache.batch_repeat_interleave(3),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "select many": lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 1, 1, 2])),
    "select by a mask": lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])),
}


@pytest.mark.parametrize("change", CHANGES)
def test_rows_and_positions_change_as_in_a_dynamic_cache(change):
    model = zoo.model("llama")
    inputs = {"input_ids": torch.tensor(zoo.prompts((131, 131, 131)))}
    caches = [filled(model, c, inputs) for c in (DynamicCache(), open_cache(model))]
    for cache in caches:
        CHANGES[change](cache)
    for _ in range(2):
        assert caches[0].get_seq_length() == caches[1].get_seq_length()
        size = len(states_of(caches[0])[0])
        if caches[0].get_seq_length():
            for expected, states in zip(*map(states_of, caches), strict=True):
                assert states.equal(expected)
            check(caches[1])
        more = {"input_ids": torch.arange(1, 1 + 40 * size).view(size, 40) % 300}
        for cache in caches:
            filled(model, cache, more)


@pytest.mark.parametrize("kv_format", ["int8", "int4", "int2", "k4v2", "int8,1=native"])
def test_a_crop_within_a_sealed_block_keeps_what_was_read_from_it(kv_format):
    model = zoo.model("llama")
    cache = filled(model, open_cache(model, kv_format), batch_of((400, 333)))
    before = states_of(cache)
    for num_removed in (5, 60, 70, 130):
        length = cache.get_seq_length()
        cache.crop(-num_removed)
        assert cache.get_seq_length() == length - num_removed
        check(cache)
        for states, old in zip(states_of(cache), before, strict=True):
            # What stays of a sealed block is stored again in bfloat16.
            expected = old[:, :, : states.shape[2]]
            torch.testing.assert_close(states, expected, rtol=0, atol=0.05)
    filled(model, cache, batch_of((100, 100)))
    check(cache)


def test_a_crop_that_lacks_room_to_reopen_shared_blocks_changes_nothing():
    model = zoo.model("llama")
    cache = open_cache(model, "int2", num_blocks=14)
    torch.manual_seed(0)
    feed(cache, *torch.randn(2, 1, 2, 160, 16))
    cache.batch_repeat_interleave(6)
    stats = cache.memory_stats()
    assert stats.body > 0
    with pytest.raises(OutOfBlocksError, match="more blocks are needed"):
        cache.crop(-60)
    assert cache.get_seq_length() == 160
    assert cache.memory_stats() == stats
    check(cache)
    cache.batch_select_indices(torch.tensor([2]))
    cache.crop(-60)
    check(cache)


@pytest.mark.parametrize("kv_format", ["native", "int8", "int2", "int2,0=native"])
def test_drafts_that_are_taken_back_leave_nothing_behind(kv_format):
    """Also where the drafts alone would fill a block, or all that a step brought goes again."""
    model = zoo.model("llama")
    plain, cache = open_cache(model, kv_format), open_cache(model, kv_format)
    cache.activate_past_recording()
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 300, 16)
    feed(plain, keys[:, :, :60], values[:, :, :60])
    feed(cache, keys[:, :, :60], values[:, :, :60])
    for start in range(60, 300):
        new, end = slice(start, start + 1), start + 1
        feed(plain, keys[:, :, new], values[:, :, new])
        drafts = torch.randn(2, 2, 2, 4, 16)
        drafted = [
            torch.cat([states[:, :, new], draft], 2)
            for states, draft in zip((keys, values), drafts, strict=True)
        ]
        if start % 7 == 0:
            feed(cache, *drafted)
            cache.crop(-5)
            assert cache.get_seq_length() == start
        feed(cache, *drafted)
        assert cache.get_seq_length() == end + 4
        cache.crop(-4)
        assert cache.get_seq_length() == end
        check(cache)
    seals = plain.memory_stats().body
    assert cache.memory_stats().body == seals
    assert (seals == 0) == (kv_format == "native")
    for states, expected in zip(states_of(cache), states_of(plain), strict=True):
        assert states.equal(expected)


# -- refusals -------------------------------------------------------------------------------------


def test_a_pool_that_is_too_small_says_so_and_stays_as_it_was():
    model = zoo.model("llama")
    cache = open_cache(model, num_blocks=12)
    prompt = prompt_of()["input_ids"]
    with pytest.raises(OutOfBlocksError, match=r"blocks are needed, 12 of 12 are free.*num_blocks"):
        generate(model, batch_of(), past_key_values=cache)
    assert cache.get_seq_length() == 0
    filled(model, cache, {"input_ids": prompt})
    before = states_of(cache)
    text = torch.cat([prompt] * 2, 1)[:, :180]
    with pytest.raises(OutOfBlocksError, match=r"1 more blocks are needed, 0 of 12 are free"):
        generate(model, {"input_ids": text}, past_key_values=cache)
    assert cache.get_seq_length() == 192  # it went as far as there were blocks
    check(cache)
    for states, old in zip(cropped_states(cache, 131), before, strict=True):
        assert states.equal(old)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_format": "int5"}, "int5"),
        ({"max_cache_len": 0}, "max_cache_len must be at least 1, got 0"),
        ({"num_blocks": 1.5}, r"num_blocks must be an integer, got 1\.5"),
        ({"kv_memory": "much"}, "much"),
        ({"kv_memory": "1MiB", "num_blocks": 3}, "kv_memory"),
        ({"kv_memory": 10}, "10 bytes hold no block"),
        ({"kv_dtype": "float32"}, "kv_dtype"),
        ({"calibration": 3}, "calibration"),
        ({"model": "a model"}, "model must be a PreTrainedModel"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(PagedKVError, match=message):
        PagedCache(**{"model": zoo.model("llama"), **wrong})


def test_models_with_other_states_are_refused():
    model = zoo.build(
        "Qwen3NextForCausalLM",
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        head_dim=16,
        **zoo.EXPERTS,
    )
    with pytest.raises(UnsupportedModelError, match="in layer 0, which is not keys and values"):
        PagedCache(model)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        PagedCache(zoo.build("T5ForConditionalGeneration", d_model=32, num_layers=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.crop(1.5), r"got 1\.5"),
        (lambda c: c.reorder_cache(torch.tensor([0, 3, 1])), "there is no row 3"),
        (lambda c: c.reorder_cache([0, 1]), "beam_idx must be a tensor"),
        (lambda c: c.batch_select_indices(torch.tensor([0.5])), "indices must be"),
        (lambda c: c.batch_repeat_interleave(0), "repeats must be at least 1, got 0"),
        (lambda c: c.batch_repeat_interleave(1 << 20), "cannot become"),
        (lambda c: c.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0), "holds 3"),
        (lambda c: c.update(torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 16), 0), "key must"),
        (lambda c: c.update(torch.zeros(3, 2, 600, 16), torch.zeros(3, 2, 600, 16), 0), "512"),
        (lambda c: c.layers[0].crop(-1), "call crop of the PagedCache"),
    ],
    ids=range(10),
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(change, message):
    model = zoo.model("llama")
    cache = filled(model, open_cache(model), batch_of())
    before = states_of(cache)
    with pytest.raises(PagedKVError, match=message):
        change(cache)
    assert cache.get_seq_length() == 131
    check(cache)
    assert all(one.equal(two) for one, two in zip(states_of(cache), before, strict=True))


def test_padding_cannot_become_tokens_later():
    model = zoo.model("llama")
    cache = filled(model, open_cache(model), batch_of())
    mask = torch.ones(3, 132, dtype=torch.int64)
    with pytest.raises(InvalidRequestError, match=r"attention_mask\[1, 0\] is 1, but"):
        model(torch.tensor([[1], [2], [3]]), attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 131


def test_keys_that_want_gradients_are_refused():
    model = zoo.model("llama")
    cache = open_cache(model)
    with pytest.raises(ConfigError, match="no backward pass"):
        model(prompt_of()["input_ids"], past_key_values=cache)
    assert cache.get_seq_length() == 0


@every_route
def test_a_forward_pass_that_was_cut_off_changes_nothing(monkeypatch, fused):
    model = zoo.model("llama")
    prompt = prompt_of()["input_ids"]
    cache = filled(model, open_cache(model, fused=fused), {"input_ids": prompt})
    layer = model.model.layers[1]

    def interrupt(hidden: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer.mlp, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            filled(model, cache, {"input_ids": prompt})
    assert cache.get_seq_length() == 131
    text = torch.cat([prompt, torch.tensor([[4]])], 1)
    tokens = generate(model, {"input_ids": text}, past_key_values=cache)
    assert tokens.equal(generate(model, {"input_ids": text}))
    check(cache)


def test_attention_that_reads_blocks_refuses_what_it_does_not_compute():
    model = zoo.model("llama")
    cache = filled(model, open_cache(model, fused=True), batch_of())
    token, mask = torch.ones(3, 1, dtype=torch.int64), torch.ones(3, 132, dtype=torch.int64)
    mask[:, :128] = 0
    with pytest.raises(InvalidRequestError, match="attention_mask hides tokens that are stored"):
        filled(model, cache, {"input_ids": token, "attention_mask": mask})
    with pytest.raises(UnsupportedModelError, match="brings its own attention mask"):
        filled(model, cache, {"input_ids": token, "attention_mask": torch.ones(3, 1, 1, 132)})
    assert cache.get_seq_length() == 131
    with pytest.raises(ConfigError, match="attention is 'eager' now, and was another"):
        model(token, past_key_values=cache)
    other = open_cache(model)
    with attention(model, fused=True):
        with pytest.raises(ConfigError, match="attention is 'paged_kv' now"):
            model(token, past_key_values=other)
        with pytest.raises(PagedKVError, match="call it with a PagedCache"):
            model(token, past_key_values=DynamicCache())
    with LLM(model, kv_format="native", num_blocks=64), pytest.raises(PagedKVError, match="LLM"):
        PagedCache(model)
    filled(model, cache, {"input_ids": token})
    check(cache)


def test_memory_figures_and_names():
    model = zoo.model("llama")
    cache = PagedCache(model, kv_memory="1MiB", kv_format="int4")
    assert cache.memory_stats().total == 0
    generate(model, prompt_of(), past_key_values=cache)
    stats = cache.memory_stats()
    assert 0 < stats.used < stats.allocated < stats.total <= 1 << 20
    assert repr(cache) == "PagedCache(int4, 3 layers, 1 sequences of 154)"
    cache = PagedCache(model, {"default": "int2", 0: "int8", -1: "native"})
    assert repr(cache).startswith("PagedCache(int8,1=int2,2=native, 3 layers")
    assert np.isclose(stats.total, 1 << 20, rtol=0.05)
    cache.reset()
    assert cache.memory_stats().allocated == 0


def test_the_documented_example_runs(tmp_path, capsys):
    document = (Path(__file__).parents[2] / "docs" / "embedding.md").read_text()
    example = re.search(r"```python\n(from transformers.*?)```", document, re.DOTALL)
    assert example is not None
    exec(example[1].replace("path/to/model", save_model("llama-gqa4", tmp_path)), {})
    assert "MemoryStats(total=" in capsys.readouterr().out
