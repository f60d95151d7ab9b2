"""Every public name with values that mean nothing: it works, or says so by an error of its own.

Not by another exception, not after a second, and not with anything half done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from hashlib import sha256

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from paged_kv import (
    FORMATS,
    INT2,
    INT4,
    LLM,
    NATIVE,
    BeamSearchParams,
    BlockGeometry,
    BlockManager,
    KVFormat,
    LayerSpec,
    PagedCache,
    PagedKVCache,
    PagedKVError,
    Request,
    SamplingParams,
    Scheduler,
    SinkWindow,
    StructuredOutput,
    cache_geometry,
    export_sequence,
    free_memory,
    import_sequence,
    num_blocks_for,
)
from paged_kv.cache import device_memory
from paged_kv.cache.transfer import FRAME
from paged_kv.engine.config import EngineConfig
from paged_kv.units import parse_memory

SECONDS = 30.0  # a hang, not a speed


def label(value: object) -> str:
    """The same in every process, as addresses are not."""
    return str(value).split(" at 0x")[0][:40]


def small_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


LAYERS = [LayerSpec(kv_format="int8", num_kv_heads=1, key_dim=8, value_dim=8)]
GEOMETRY = BlockGeometry(block_size=4, open_block_size=4, num_head_tokens=0, min_tail_tokens=0)
GOOD: dict[Callable[..., object], dict[str, object]] = {
    SamplingParams: {
        "temperature": 1.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "top_h": 0.5,
        "typical_p": 0.5,
        "epsilon_cutoff": 0.1,
        "eta_cutoff": 0.1,
        "seed": 1,
        "logit_bias": {1: 2.0},
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [[1, 2]],
        "suppress_tokens": [1],
        "begin_suppress_tokens": [1],
        "forced_bos_token_id": 1,
        "forced_eos_token_id": 1,
        "exponential_decay_length_penalty": (3, 1.5),
        "max_tokens": 3,
        "min_tokens": 1,
        "n": 1,
        "best_of": 2,
        "logprobs": 3,
        "prompt_logprobs": 3,
        "structured_output": StructuredOutput(regex="a"),
        "cache_salt": "x",
        "stop": "a",
        "stop_token_ids": [1],
        "ignore_eos": False,
        "logits_processors": (),
        "sink_window": SinkWindow(),
    },
    StructuredOutput: {"regex": "a"},
    BeamSearchParams: {
        "num_beams": 4,
        "num_return": 1,
        "length_penalty": 1.0,
        "early_stopping": False,
        "max_tokens": 3,
        "stop_token_ids": (),
        "ignore_eos": False,
        "cache_salt": None,
    },
    KVFormat: {
        "name": "mine",
        "key_bits": 2,
        "value_bits": 4,
        "has_token_keys": False,
        "wide_key_share": 0.25,
        "has_error_feedback": False,
        "rotates_values": True,
        "block_size": 128,
        "key_group_size": 128,
        "key_clip": 1.0,
        "wide_key_clip": 1.0,
        "value_clip": 1.0,
        "num_sink_tokens": 4,
        "min_tail_tokens": 32,
    },
    LayerSpec: {"kv_format": INT4, "num_kv_heads": 1, "key_dim": 8, "value_dim": 8},
    BlockGeometry: {
        "block_size": 8,
        "open_block_size": 4,
        "num_head_tokens": 4,
        "min_tail_tokens": 4,
    },
    SinkWindow: {"num_sink_tokens": 4, "window_size": 64},
    EngineConfig: {
        "kv_format": "int4",
        "kv_memory": None,
        "num_blocks": 3,
        "max_num_seqs": 2,
        "token_budget": 9,
        "max_model_len": 7,
        "prefix_caching": True,
        "record_events": False,
        "swap_space": 0,
        "num_threads": None,
        "enforce_eager": False,
        "sink_window": None,
    },
    PagedKVCache: {
        "layers": LAYERS,
        "num_blocks": 4,
        "dtype": torch.float32,
        "device": "cpu",
        "num_host_blocks": 0,
        "backend": None,
    },
    PagedCache: {
        "model": small_model(),
        "kv_format": "int4",
        "max_cache_len": 64,
        "num_blocks": 3,
        "kv_memory": None,
        "kv_dtype": None,
        "calibration": None,
        "sink_window": None,
    },
    BlockManager: {
        "geometry": GEOMETRY,
        "num_blocks": 4,
        "max_num_seqs": 2,
        "max_model_len": 20,
        "prefix_caching": False,
        "fingerprint": b"",
        "record_events": False,
        "num_host_blocks": 0,
    },
    Request: {
        "request_id": "a",
        "prompt_token_ids": [1],
        "max_tokens": 2,
        "priority": 0,
        "extra_keys": (),
        "sink_window": None,
        "branching": None,
    },
}
WRONG = [
    *(None, True, -1, 0, 1.5, "3", "int3", b"x", math.nan, math.inf, -math.inf, 1 << 70),
    *(np.int64(-3), np.float32(2), 2j, [], {}, (1,), object(), int),
]


def works_or_refuses(call: Callable[[], object]) -> object:
    """What it gives, or None where it refuses; anything else, or more than a second, fails."""
    start = time.process_time()
    try:
        return call()
    except PagedKVError:
        return None
    finally:
        assert time.process_time() - start < SECONDS


@pytest.fixture(scope="module", autouse=True)
def _small_machine():
    """Of 256 MiB, so that what is too large is refused; compiled for all that follows."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (free_memory, device_memory):
            patch.setattr(module, "free_host_memory", lambda: 1 << 28)
        warm_up()
        yield


def warm_up() -> None:
    """What is compiled or imported on first use does not count."""
    PagedKVCache(LAYERS, num_blocks=1, dtype=torch.float32)
    manager = new_manager()
    scheduler = Scheduler(manager, token_budget=4)
    scheduler.add(Request("a", [1], 2))
    scheduler.schedule()


def new_manager() -> BlockManager:
    return BlockManager(
        GEOMETRY,
        num_blocks=8,
        max_num_seqs=2,
        max_model_len=20,
        prefix_caching=True,
        num_host_blocks=4,
    )


FIELDS = [(maker, name) for maker, good in GOOD.items() for name in good]


@pytest.mark.parametrize(
    ("maker", "name"), FIELDS, ids=[f"{maker.__name__}-{name}" for maker, name in FIELDS]
)
def test_a_wrong_value_of_any_setting_is_refused_or_works(maker, name):
    assert maker(**GOOD[maker]) is not None
    for value in WRONG:
        works_or_refuses(lambda v=value: maker(**(GOOD[maker] | {name: v})))


MEANINGLESS = [
    (SamplingParams, {"ignore_eos": "no"}),
    (SamplingParams, {"logits_processors": [3]}),
    (SamplingParams, {"n": 1 << 40}),
    (SamplingParams, {"temperature": math.nan}),
    (BeamSearchParams, {"ignore_eos": None}),
    (KVFormat, {"key_bits": 4.0}),
    (KVFormat, {"value_bits": True}),
    (KVFormat, {"key_clip": "1"}),
    (KVFormat, {"num_sink_tokens": 1.5}),
    (LayerSpec, {"num_kv_heads": 1.0}),
    (LayerSpec, {"key_dim": "8"}),
    (BlockGeometry, {"block_size": 0}),
    (BlockGeometry, {"block_size": 8.0}),
    (BlockGeometry, {"min_tail_tokens": math.nan}),
    (SinkWindow, {"window_size": 64.0}),
    (EngineConfig, {"num_blocks": 1.5}),
    (EngineConfig, {"max_num_seqs": None}),
    (EngineConfig, {"max_num_seqs": True}),
    (EngineConfig, {"prefix_caching": "no"}),
    (EngineConfig, {"swap_space": None}),
    (EngineConfig, {"swap_space": True}),
    (PagedKVCache, {"num_blocks": 1.5}),
    (PagedKVCache, {"num_blocks": "3"}),
    (PagedKVCache, {"num_blocks": True}),
    (PagedKVCache, {"num_host_blocks": -1}),
    (PagedKVCache, {"num_host_blocks": 2.0}),
    (PagedKVCache, {"layers": "int8"}),
    (PagedKVCache, {"dtype": "float32"}),
    (PagedKVCache, {"backend": 0}),
    (PagedCache, {"model": "llama"}),
    (PagedCache, {"max_cache_len": 64.0}),
    (PagedCache, {"num_blocks": "3"}),
    (PagedCache, {"kv_dtype": "float32"}),
    (PagedCache, {"calibration": 3}),
    (BlockManager, {"num_blocks": 4.0}),
    (BlockManager, {"max_num_seqs": 2.5}),
    (BlockManager, {"max_model_len": "20"}),
    (BlockManager, {"max_model_len": math.inf}),
    (BlockManager, {"num_host_blocks": -1}),
    (BlockManager, {"geometry": 4}),
    (Request, {"request_id": ["a"]}),
    (Request, {"extra_keys": "salt"}),
    (Request, {"prompt_token_ids": [-1]}),
    (Request, {"max_tokens": 1 << 70}),
    (Request, {"sink_window": 64}),
]


@pytest.mark.parametrize(("maker", "wrong"), MEANINGLESS, ids=label)
def test_what_means_nothing_is_refused_by_name_and_value(maker, wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(PagedKVError) as caught:
        maker(**(GOOD[maker] | wrong))
    shown = "integers" if name == "prompt_token_ids" else str(value).strip("'[]")[:12]
    assert name.replace("prompt_", "").replace("_", " ") in str(caught.value).replace("_", " ")
    assert shown in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, -0.1, 1.0, "0.5", None, True])
def test_a_watermark_or_cost_of_a_scheduler_is_a_number(value):
    for options in ({"watermark": value}, {"swap_cost": -1.0 if value == 1.0 else value}):
        with pytest.raises(PagedKVError, match=next(iter(options))):
            Scheduler(new_manager(), token_budget=4, **options)
    for manager, budget in ((None, 4), (new_manager(), 4.0), (new_manager(), 1 << 70)):
        with pytest.raises(PagedKVError):
            Scheduler(manager, token_budget=budget)


@pytest.mark.parametrize("wrong", WRONG, ids=label)
def test_methods_of_a_manager_refuse_or_work(wrong):
    def started() -> tuple[BlockManager, int]:
        manager = new_manager()
        return manager, manager.add_sequence([1, 2, 3])

    def planned(seq_ids: object, counts: object, drafts: object = None, kept: object = None):
        manager, _ = started()
        plan = manager.reserve(seq_ids, counts, drafts)
        manager.commit(plan, kept)

    for name in (
        *("add_sequence", "chain_tokens", "fork", "remove_sequence", "swap_out", "swap_in"),
        *("find_prefix", "commit", "rollback", "publish_sequence", "discard_swapped"),
        "fitted_window",
    ):
        manager, _ = started()
        works_or_refuses(lambda m=manager, n=name: getattr(m, n)(wrong))
        manager.check_integrity()
    manager, seq_id = started()
    for call in (
        lambda: manager.truncate(wrong, 0),
        lambda: manager.truncate(seq_id, wrong),
        lambda: manager.append_tokens(wrong, [1]),
        lambda: manager.append_tokens([seq_id], wrong),
        lambda: manager.append_tokens([seq_id], [1], wrong),
        lambda: manager.chain_tokens([1], wrong),
        lambda: manager.chain_tokens([1], (), wrong),
        lambda: planned(wrong, [1]),
        lambda: planned([seq_id], wrong),
        lambda: planned([seq_id], [2], wrong),
        lambda: planned([seq_id], [2], [1], wrong),
    ):
        works_or_refuses(call)
    manager.check_integrity()


@pytest.mark.parametrize("wrong", WRONG, ids=label)
def test_functions_of_a_cache_refuse_or_work(wrong):
    cache = PagedKVCache(LAYERS, num_blocks=4, num_host_blocks=2, dtype=torch.float32)
    manager = cache.new_manager(max_num_seqs=1, max_model_len=10)
    seq_id = manager.add_sequence([1])
    ids = np.array([1, 2], dtype=np.int32)
    for call in (
        lambda: cache_geometry(wrong, torch.float32),
        lambda: cache_geometry(LAYERS, wrong),
        lambda: num_blocks_for(wrong, LAYERS, torch.float32),
        lambda: num_blocks_for(1 << 20, wrong, torch.float32),
        lambda: export_sequence(wrong, manager, seq_id),
        lambda: export_sequence(cache, wrong, seq_id),
        lambda: export_sequence(cache, manager, wrong),
        lambda: export_sequence(cache, manager, seq_id, model_fingerprint=wrong),
        lambda: import_sequence(wrong, manager, b""),
        lambda: import_sequence(cache, manager, wrong),
        lambda: cache.memory_stats(wrong),
        lambda: cache.swap_out(wrong, ids),
        lambda: cache.swap_out(ids, wrong),
        lambda: cache.swap_in(ids, ids + 1),
        lambda: INT4.with_options(name=wrong),
        lambda: parse_memory(wrong),
    ):
        works_or_refuses(call)
    manager.check_integrity()


@pytest.mark.parametrize("wrong", [None, -1, 1.5, "0", True, 7])
def test_a_seq_id_that_is_none_is_refused(wrong):
    manager = new_manager()
    manager.add_sequence([1, 2, 3])
    for name in (
        *("fork", "remove_sequence", "swap_out", "publish_sequence", "chain_of"),
        *("block_ids", "body_ids", "head_and_tail_ids"),
    ):
        with pytest.raises(PagedKVError, match="holds no sequence"):
            getattr(manager, name)(wrong)
    assert manager.living_seq_ids.tolist() == [0]


@pytest.mark.parametrize("wrong", [None, 3, "a"])
def test_what_is_no_request_or_step_changes_no_scheduler(wrong):
    scheduler = Scheduler(new_manager(), token_budget=4)
    for call in (
        lambda: scheduler.add(wrong),
        lambda: scheduler.finish(wrong),
        lambda: scheduler.cancel(wrong),
        lambda: scheduler.update(wrong, [1]),
    ):
        with pytest.raises(PagedKVError):
            call()
    request = Request(request_id="a", prompt_token_ids=[1, 2], max_tokens=4)
    scheduler.add(request)
    step = scheduler.schedule()
    with pytest.raises(PagedKVError):
        scheduler.update(wrong, [1])
    scheduler.update(step, [1])
    with pytest.raises(PagedKVError):
        scheduler.update(step, [1])
    scheduler.check_integrity()


def test_a_request_is_finished_once_and_by_its_own_scheduler():
    scheduler = Scheduler(new_manager(), token_budget=4)
    request, other = (
        Request(request_id="a", prompt_token_ids=[1, 2], max_tokens=4) for _ in range(2)
    )
    scheduler.add(request)
    for wrong in (other, request):
        with pytest.raises(PagedKVError, match="not an unfinished request"):
            scheduler.finish(wrong)
        if wrong is other:
            scheduler.finish(request)
    scheduler.check_integrity()
    assert not scheduler.has_unfinished


# -- requests to an LLM -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    model = small_model()
    with LLM(model, kv_format="native", max_num_seqs=2, num_blocks=70) as open_llm:
        open_llm.generate([1], SamplingParams(max_tokens=2))
        yield open_llm


ONE = SamplingParams(max_tokens=1)
CALLS: dict[str, Callable[[LLM, object], object]] = {
    "prompt": lambda llm, value: llm.generate(value, ONE),
    "prompts": lambda llm, value: llm.generate([[1], value], ONE),
    "token": lambda llm, value: llm.generate([[1, value]], ONE),
    "params": lambda llm, value: llm.generate([[1], [2]], value),
    "priorities": lambda llm, value: llm.generate([[1], [2]], ONE, priorities=value),
    "priority": lambda llm, value: llm.generate([[1]], ONE, priorities=[value]),
    "stream": lambda llm, value: list(llm.stream(value, ONE)),
    "stream params": lambda llm, value: list(llm.stream([1], value)),
    "beam search": lambda llm, value: llm.beam_search(value, BeamSearchParams(num_beams=2)),
    "beam params": lambda llm, value: llm.beam_search([[1]], value),
}
ODD = [
    *("", "text", "\ud800", [[]], [None], [[None]], [1 << 70], [-1], [32], [[1], "a"], [1.5]),
    *({0: 1}, {"role": "user"}, [{"role": "user"}], range(3), iter([1]), torch.tensor([1, 2])),
    *(bytearray(b"x"), SamplingParams, [SamplingParams], BeamSearchParams(), [ONE], {"n": 1}),
]


@pytest.mark.parametrize("value", [*WRONG, *ODD], ids=label)
def test_any_argument_of_a_request_is_refused_or_works(llm, value):
    for call in CALLS.values():
        works_or_refuses(lambda c=call: c(llm, value))
        llm.engine.scheduler.check_integrity()
        assert not llm.engine.has_unfinished
        assert llm.engine.manager.num_free_blocks == llm.engine.manager.num_blocks


@pytest.mark.parametrize("max_tokens", [1 << 63, 1 << 70])
def test_a_windowed_request_counts_to_a_limit(llm, max_tokens):
    params = SamplingParams(
        max_tokens=max_tokens, sink_window=SinkWindow(4, 64), stop_token_ids=list(range(32))
    )
    with pytest.raises(PagedKVError, match=f"max_tokens must be at most .*, got {max_tokens}"):
        llm.generate([1], params)


def test_ten_million_token_ids_are_refused_by_their_number(llm):
    prompt = [1] * 10_000_000
    start = time.process_time()
    with pytest.raises(PagedKVError, match="10000000"):
        llm.generate(prompt, ONE)
    assert time.process_time() - start < SECONDS


# -- fuzzing ------------------------------------------------------------------------------------

FUZZ = settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 300),
    st.sampled_from([1 << 31, (1 << 31) - 1, 1 << 63, -(1 << 63), 1 << 20]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["int2", "native", "2G", "1e9", "\ud800", "", "0", "-1"]),
    st.binary(max_size=4),
    st.lists(st.integers(-2, 40) | st.none(), max_size=3),
    st.builds(np.int64, st.integers(-5, 1 << 40)),
    st.builds(np.float32, st.floats(width=32)),
    st.sampled_from([SinkWindow(), INT2, NATIVE, object(), torch.float32]),
)


def settings_of(maker: Callable[..., object]) -> st.SearchStrategy[dict[str, object]]:
    """Good settings of which some are anything."""
    return st.dictionaries(st.sampled_from(sorted(GOOD[maker])), ANYTHING, max_size=3)


@pytest.mark.parametrize("maker", GOOD, ids=lambda maker: maker.__name__)
def test_any_settings_work_or_are_refused(maker):
    @FUZZ
    @given(changes=settings_of(maker))
    @example(changes={})
    def run(changes):
        made = works_or_refuses(lambda: maker(**(GOOD[maker] | changes)))
        if isinstance(made, (KVFormat, LayerSpec, BlockGeometry, SinkWindow)):
            assert made == maker(**{name: getattr(made, name) for name in GOOD[maker]})

    run()


@FUZZ
@given(base=st.sampled_from(sorted(FORMATS)), changes=settings_of(KVFormat))
@example(base="int2", changes={"key_bits": None, "block_size": 100})
@example(base="native", changes={"num_sink_tokens": 1 << 20})
@example(base="int8", changes={"key_clip": 5e-324})
def test_any_options_of_a_format_make_a_cache_or_are_refused(base, changes):
    kv_format = works_or_refuses(lambda: FORMATS[base].with_options(**changes))
    if kv_format is not None:
        layer = LayerSpec(kv_format=kv_format, num_kv_heads=1, key_dim=8, value_dim=8)
        works_or_refuses(lambda: cache_geometry([layer], torch.float32))


@FUZZ
@given(amount=ANYTHING | st.text("0123456789.KMGTiB e+-", max_size=12))
@example(amount="9" * 10_000)
@example(amount="1" * 63 + "!")
@example(amount="٣G")
@example(amount="1.\n")
@example(amount=".5.5")
@example(amount=10**400)
@example(amount=1e308)
def test_any_amount_of_memory_is_bytes_or_refused(amount):
    size = works_or_refuses(lambda: parse_memory(amount))
    assert size is None or (type(size) is int and size >= 1)


@pytest.fixture(scope="module")
def exported() -> tuple[PagedKVCache, BlockManager, bytes]:
    cache = PagedKVCache(LAYERS, num_blocks=12, dtype=torch.float32)
    manager = cache.new_manager(max_num_seqs=3, max_model_len=300, prefix_caching=True)
    seq_id = manager.add_sequence(np.arange(150))
    plan = manager.reserve([seq_id], [150])
    cache.begin(plan)
    manager.commit(plan)
    data = export_sequence(cache, manager, seq_id)
    manager.remove_sequence(seq_id)
    return cache, manager, data


@FUZZ
@given(
    start=st.integers(0, 400) | st.integers(0, 100_000),
    end=st.integers(0, 400) | st.integers(0, 100_000),
    put=st.binary(max_size=40),
    is_signed=st.booleans(),
)
@example(start=0, end=100_000, put=b"", is_signed=False)
@example(start=0, end=0, put=b"", is_signed=False)
@example(start=12, end=16, put=b"\xff\xff\xff\xff", is_signed=True)
@example(start=16, end=24, put=bytes(8), is_signed=True)
def test_any_bytes_are_imported_or_refused(exported, start, end, put, is_signed):
    """An export of which a part was replaced, with a checksum that agrees or not."""
    cache, manager, data = exported
    forged = data[: min(start, end)] + put + data[max(start, end) :]
    if is_signed and len(forged) > 32 + FRAME.size:
        forged = forged[:-32]
        forged = forged[:16] + (len(forged) + 32).to_bytes(8, "little") + forged[24:]
        forged += sha256(forged).digest()
    seq_id = works_or_refuses(lambda: import_sequence(cache, manager, forged))
    manager.check_integrity()
    if seq_id is not None:
        again = export_sequence(cache, manager, seq_id)
        manager.remove_sequence(seq_id)
        assert len(again) == len(forged)
    assert manager.num_free_blocks == manager.num_blocks
