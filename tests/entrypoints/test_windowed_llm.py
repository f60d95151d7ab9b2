"""Windowed sequences through models, engine and scheduler: the tokens that the definition gives,
for ever.

The reference runs a model over a whole sequence at once, without blocks and without its own
rotary embedding: for each token it places sinks and window as StreamingLLM's cache does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from paged_kv import LLM, SamplingParams, SinkWindow
from paged_kv.cache.transfer import export_sequence
from paged_kv.errors import ConfigError, InvalidRequestError, TransferError, UnsupportedModelError
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler
from tests.support import zoo
from tests.support.paged_models import POOL, open_llm, preempted

__all__ = ["preempted"]  # a fixture

WINDOW = SinkWindow(4, 40)  # 16 sinks, once rounded
SEEN = SinkWindow(16, 40)
FORMATS = ("native", "int8", "int4", "int2")
LAYOUTS = {
    "llama": 16,
    "llama-rope-llama3": 16,
    "llama-rope-yarn": 16,
    "gpt-neox": 4,
    "cohere2": 16,
}


def params(count: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, **options)


def tokens_of(llm: LLM, prompts: Sequence[list[int]], options: Any) -> list[list[int]]:
    outputs = llm.generate(prompts, options, show_progress=False)
    llm.engine.scheduler.check_integrity()
    assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks
    return [output.token_ids for output in outputs]


# -- the definition -----------------------------------------------------------------------------


def turned(tokens: Tensor, places: Tensor, module: nn.Module, num_turned: int) -> Tensor:
    """RoPE of tokens [..., K, D] at places [K], by the model's own frequencies."""
    frequencies = module.frequencies.double()
    if not len(frequencies):
        return tokens
    angles = places.double()[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    rest = tokens[..., num_turned:]
    if module.is_interleaved:
        first, second = tokens[..., 0:num_turned:2], tokens[..., 1:num_turned:2]
        pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
        return torch.cat([pairs.flatten(-2), rest], -1)
    first, second = tokens[..., :num_turned].chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend_by_definition(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float,
    sliding_window: int | None = None, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """Queries and keys [1, H, T, D] come from position 0: as they are before RoPE."""
    group = query.shape[1] // key.shape[1]
    keys, values = (t[0].double().repeat_interleave(group, 0) for t in (key, value))
    queries, outputs = query[0].double(), []
    for position in range(query.shape[2]):
        near = np.arange(max(position - SEEN.window_size + 1, 0), position + 1)
        seen = np.union1d(np.arange(min(SEEN.num_sink_tokens, position + 1)), near)
        places = np.arange(len(seen))
        if sliding_window is not None:
            is_near = places > len(seen) - 1 - sliding_window
            seen, places = seen[is_near], places[is_near]
        last = turned(queries[:, [position]], torch.tensor([places[-1]]), module, module.num_turned)
        placed = turned(keys[:, seen], torch.from_numpy(places), module, module.num_turned)
        weights = (last @ placed.mT * scaling).softmax(-1)
        outputs.append(weights @ values[:, seen])
    return torch.cat(outputs, 1).transpose(0, 1)[None].to(query.dtype), None


AttentionInterface.register("streaming_definition", attend_by_definition)


@contextmanager
def by_definition(name: str) -> Iterator[PreTrainedModel]:
    model = zoo.model(name)
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    for layer, module in enumerate(m for m in model.modules() if hasattr(m, "layer_idx")):
        has_positions = name != "cohere2" or layer % 2 == 0  # by its layer types
        frequencies = torch.tensor(rotary.inv_freq.tolist())  # a copy: no buffer of the model
        module.frequencies = frequencies if has_positions else frequencies[:0]
        module.is_interleaved = name == "cohere2"
        module.num_turned = LAYOUTS[name]
    before = model.config._attn_implementation
    model.set_attn_implementation("streaming_definition")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.inference_mode()
def logits_by_definition(name: str, token_ids: list[int]) -> Tensor:
    with by_definition(name) as model:
        positions = torch.zeros(1, len(token_ids), dtype=torch.int64)
        return model(
            input_ids=torch.tensor([token_ids]), position_ids=positions, use_cache=False
        ).logits[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_windowed_ones_generate_what_the_definition_says(name):
    """Greedy, six times the window, native; the prompt is longer than the window, and in chunks."""
    prompt = zoo.prompts((90,))[0]
    with open_llm(zoo.model(name), sink_window=WINDOW, token_budget=33) as llm:
        (tokens,) = tokens_of(llm, [prompt], params(150))
    logits = logits_by_definition(name, prompt + tokens)[len(prompt) - 1 : -1]
    best = logits.topk(2).values
    is_clear = best[:, 0] - best[:, 1] > 1e-3 * best[:, 0].abs()
    assert is_clear.float().mean() > 0.9
    assert torch.equal(logits.argmax(-1)[is_clear], torch.tensor(tokens)[is_clear])


def test_the_definition_is_not_full_attention():
    """Else the test above would show nothing."""
    prompt = zoo.prompts((90,))[0]
    with open_llm(zoo.model("llama")) as llm:
        (tokens,) = tokens_of(llm, [prompt], params(60))
    chosen = logits_by_definition("llama", prompt + tokens)[len(prompt) - 1 : -1].argmax(-1)
    assert chosen.tolist() != tokens


# -- batches ------------------------------------------------------------------------------------


def test_windowed_ones_and_others_give_the_tokens_that_each_gives_alone():
    prompts = zoo.prompts(tuple(range(3, 131, 6)))
    options = [params(70, sink_window=WINDOW if i % 2 else None) for i in range(len(prompts))]
    model = zoo.model("llama")
    with open_llm(model, max_num_seqs=64, num_blocks=900, token_budget=512) as llm:
        together = tokens_of(llm, prompts, options)
    with open_llm(model, max_num_seqs=1, prefix_caching=False) as llm:
        alone = [
            tokens_of(llm, [prompt], option)[0]
            for prompt, option in zip(prompts, options, strict=True)
        ]
    assert together == alone


def test_a_windowed_one_within_its_window_is_an_ordinary_sequence():
    with open_llm(zoo.model("llama")) as llm:
        assert tokens_of(llm, zoo.prompts(), params(20)) == tokens_of(
            llm, zoo.prompts(), params(20, sink_window=SinkWindow(4, 170))
        )


@pytest.mark.parametrize("kv_format", FORMATS)
def test_windowed_ones_outlive_the_models_length_in_constant_memory(kv_format):
    window = SinkWindow(4, 150)
    with open_llm(zoo.model("llama"), kv_format=kv_format, sink_window=window) as llm:
        manager = llm.engine.manager
        geometry = manager.geometry
        (tokens,) = tokens_of(llm, [zoo.prompts((10,))[0]], params(zoo.MAX_MODEL_LEN + 90))
        assert len(tokens) == zoo.MAX_MODEL_LEN + 90
        blocks = -(-(150 + manager.fitted_window(window).num_sink_tokens) // geometry.block_size)
        tail = geometry.open_blocks_per_block + 32 // geometry.open_block_size
        assert manager.pool.peak_allocated <= blocks + tail + 3


@pytest.mark.parametrize("token_budget", [7, 100, 1024])
def test_chunks_of_a_long_prompt_do_not_matter(token_budget):
    prompt = zoo.prompts((1300,))[0]  # longer than the model's length
    model = zoo.model("llama")
    with open_llm(model, sink_window=WINDOW, token_budget=token_budget) as llm:
        tokens = tokens_of(llm, [prompt], params(20))
        assert llm.engine.manager.pool.peak_allocated <= 5 + 256 // 16
    with open_llm(model, sink_window=WINDOW, token_budget=61) as llm:
        assert tokens == tokens_of(llm, [prompt], params(20))


@pytest.mark.parametrize("swap_space", [0, "64MiB"])
def test_preempted_windowed_ones_go_on_as_they_would_have(swap_space, preempted: list[Request]):
    prompts = zoo.prompts((30, 90, 60, 100))
    model = zoo.model("llama")
    with open_llm(model, sink_window=WINDOW) as llm:
        expected = tokens_of(llm, prompts, params(90))
        assert not preempted
    # Three windowed sequences hold up to 5 blocks each.
    with open_llm(model, sink_window=WINDOW, num_blocks=13, swap_space=swap_space) as llm:
        assert tokens_of(llm, prompts, params(90)) == expected
        assert preempted
        host_pool = llm.engine.manager.host_pool
        assert host_pool is None or host_pool.peak_allocated


def test_samples_of_a_windowed_one_share_its_blocks():
    prompt = zoo.prompts((120,))[0]
    with open_llm(zoo.model("llama"), sink_window=WINDOW) as llm:
        (output,) = llm.generate(
            [prompt], params(100, n=3, temperature=1.0, seed=5), show_progress=False
        )
        llm.engine.scheduler.check_integrity()
    texts = [tuple(completion.token_ids) for completion in output.completions]
    assert len(set(texts)) == 3
    with open_llm(zoo.model("llama"), sink_window=WINDOW, max_num_seqs=1) as llm:
        (alone,) = llm.generate(
            [prompt], params(100, n=3, temperature=1.0, seed=5), show_progress=False
        )
    assert [tuple(completion.token_ids) for completion in alone.completions] == texts


def test_a_windowed_one_without_max_tokens_goes_on_until_it_is_closed():
    with open_llm(zoo.model("llama"), sink_window=WINDOW) as llm:
        events = llm.stream([[1, 2, 3]], params(None))
        for _ in range(zoo.MAX_MODEL_LEN + 90):
            assert next(events).finish_reason is None
        events.close()
        assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks


# -- the prefix cache ---------------------------------------------------------------------------


@pytest.mark.parametrize("kv_format", ["native", "int8"])
def test_nothing_past_sinks_and_window_is_shared(kv_format):
    """A stream's later K/V are not those of a sequence that saw everything, nor the reverse."""
    window = SinkWindow(4, 140)
    prompt = zoo.prompts((400,))[0]
    model = zoo.model("llama")
    for first, second in ((window, None), (None, window), (window, window)):
        with open_llm(model, kv_format=kv_format, num_blocks=200) as llm:
            manager = llm.engine.manager
            tokens_of(llm, [prompt], params(40, sink_window=first))
            limit = manager.geometry.link_end(
                manager.geometry.num_links(manager.fitted_window(window).num_visible_tokens)
            )
            before = manager.prefix_statistics.num_hit_tokens
            shared = tokens_of(llm, [prompt], params(40, sink_window=second))
            assert manager.prefix_statistics.num_hit_tokens - before == limit
        with open_llm(model, kv_format=kv_format, num_blocks=200, prefix_caching=False) as llm:
            if kv_format == "native":
                assert tokens_of(llm, [prompt], params(40, sink_window=second)) == shared


def test_who_waits_for_a_windowed_ones_blocks_does_not_wait_for_ever():
    """A prompt whose next link a windowed sequence was to store: it never will."""
    prompt = zoo.prompts((300,))[0]
    with open_llm(zoo.model("llama"), num_blocks=300, token_budget=64) as llm:
        together = tokens_of(llm, [prompt, prompt], [params(10, sink_window=WINDOW), params(10)])
    with open_llm(zoo.model("llama"), num_blocks=300) as llm:
        alone = [tokens_of(llm, [prompt], params(10, sink_window=w))[0] for w in (WINDOW, None)]
    assert together == alone


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sinks", "window", "message"),
    [(-1, 100, "num_sink_tokens must not be negative, got -1"),
     (4, 0, "window_size must be at least 1, got 0"),
     (4, -5, "window_size must be at least 1, got -5"),
     (4.5, 10, "num_sink_tokens must be an integer, got 4.5"),
     (True, 10, "num_sink_tokens must be"), (4, "x", "window_size must be")],
)  # fmt: skip
def test_windows_that_cannot_be_are_refused(sinks, window, message):
    with pytest.raises(ConfigError, match=message):
        SinkWindow(sinks, window)


@pytest.mark.parametrize(
    ("kv_format", "window", "message"),
    [("native", SinkWindow(4, 15), "window_size must be at least a block of 16 tokens, got 15"),
     ("int8", SinkWindow(4, 63), "window_size must be at least a block of 64 tokens, got 63"),
     ("int8", SinkWindow(500, 128), "num_sink_tokens must be at most .*got 500"),
     ("native", SinkWindow(4, 5000), f"needs .* blocks; the pool has {POOL}")],
)  # fmt: skip
def test_windows_that_do_not_fit_are_refused_before_anything_is_taken(kv_format, window, message):
    with open_llm(zoo.model("llama"), kv_format=kv_format) as llm:
        with pytest.raises(InvalidRequestError, match=message):
            llm.generate([[1, 2]], params(3, sink_window=window))
        assert not llm.engine.has_unfinished
        assert llm.engine.manager.num_free_blocks == POOL
        assert tokens_of(llm, [[1, 2]], params(3))
    if "at most" not in message:  # the engine's own window makes its head as large
        with pytest.raises(ConfigError, match=message):
            open_llm(zoo.model("llama"), kv_format=kv_format, sink_window=window)


def test_the_engines_own_window_makes_room_for_its_sinks():
    """Formats that seal keep sinks in their head, which becomes as large."""
    with open_llm(zoo.model("llama"), kv_format="int8", sink_window=SinkWindow(100, 130)) as llm:
        assert llm.engine.manager.geometry.num_head_tokens >= 100
        tokens_of(llm, [zoo.prompts((50,))[0]], params(400))


def test_a_window_must_be_a_window():
    with pytest.raises(ConfigError, match="sink_window must be"):
        SamplingParams(sink_window=(4, 100))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sink_window must be"):
        open_llm(zoo.model("llama"), sink_window=1024)


@pytest.mark.parametrize("name", ["gpt2", "llama4"])
def test_models_that_cannot_windowed_one_are_refused(name):
    with pytest.raises(UnsupportedModelError):
        open_llm(zoo.model(name), sink_window=WINDOW)
    with open_llm(zoo.model(name)) as llm:
        with pytest.raises(UnsupportedModelError):
            llm.generate([[1, 2]], params(3, sink_window=WINDOW))
        assert tokens_of(llm, [[1, 2]], params(3))


def test_a_windowed_one_is_not_exported():
    with open_llm(zoo.model("llama")) as llm:
        manager = llm.engine.manager
        seq_id = manager.add_sequence(manager.chain_tokens([1], sink_window=WINDOW))
        with pytest.raises(TransferError, match=f"seq_id {seq_id} is windowed"):
            export_sequence(llm.engine.cache, manager, seq_id)


def test_a_scheduler_checks_windowed_ones_too():
    with open_llm(zoo.model("llama")) as llm:
        scheduler = Scheduler(llm.engine.manager, token_budget=8)
        request = Request("a", [1], 5, sink_window=SinkWindow(4, 3))
        with pytest.raises(InvalidRequestError, match="request 'a' cannot be windowed"):
            scheduler.add(request)
        assert not scheduler.has_unfinished
