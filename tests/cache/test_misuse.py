"""Steps, managers, layers and tensors that do not go together are refused; nothing is written."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from paged_kv import BlockManager, LayerSpec, PagedKVCache, PagedKVError, paged_attention
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.cache.kv_cache import Step
from paged_kv.cache.transfer import export_sequence, import_sequence
from paged_kv.errors import ConfigError, InvalidStepError

LAYERS = [LayerSpec(kv_format="int2", num_kv_heads=2, key_dim=16, value_dim=8)] * 2
LIMITS = {"max_num_seqs": 2, "max_model_len": 500}


def tensors(count: int, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return tuple(
        torch.randn(count, heads, dim, generator=generator).to(**options)
        for heads, dim in ((4, 16), (2, 16), (2, 8))
    )


@dataclass
class Serving:
    cache: PagedKVCache
    manager: BlockManager
    seq_id: int

    @classmethod
    def new(cls, **options: object) -> Serving:
        cache = PagedKVCache(LAYERS, num_blocks=40, dtype=torch.float32, **options)
        manager = cache.new_manager(**LIMITS)
        return cls(cache, manager, manager.add_sequence())

    def plan(self, count: int = 3) -> StepPlan:
        plan = self.manager.reserve([self.seq_id], [count])
        assert plan is not None
        return plan

    def attend(self, step: Step, layer: int = 0, count: int = 3, **options: object) -> Tensor:
        return paged_attention(*tensors(count), self.cache, layer, step, **options)

    def run(self, count: int = 3) -> StepPlan:
        plan = self.plan(count)
        step = self.cache.begin(plan)
        for layer in range(len(LAYERS)):
            self.attend(step, layer, count)
        self.manager.commit(plan)
        return plan

    def bytes(self) -> list[bytes]:
        return [arena.numpy().tobytes() for arena in self.cache.arenas]


@pytest.fixture
def serving() -> Serving:
    return Serving.new()


def assert_refused(serving: Serving, match: str, error: type[PagedKVError], call) -> None:
    before = serving.bytes()
    with pytest.raises(error, match=match):
        call()
    assert serving.bytes() == before


@pytest.mark.parametrize("how", ["commit", "rollback"])
def test_a_plan_that_is_over_does_not_begin_and_its_step_does_not_go_on(serving, how):
    serving.run()
    plan = serving.plan()
    step = serving.cache.begin(plan)
    getattr(serving.manager, how)(plan)
    assert_refused(serving, "over", InvalidStepError, lambda: serving.attend(step))
    assert_refused(
        serving,
        "committed or rolled back",
        InvalidStepError,
        lambda: serving.cache.begin(plan),
    )
    serving.run()


def test_the_step_of_an_earlier_plan_is_refused(serving):
    plan = serving.plan()
    first = serving.cache.begin(plan)
    copy = pickle.loads(pickle.dumps(plan))  # another process does not know that it is over
    second = serving.cache.begin(copy)
    assert_refused(
        serving, "not the last to begin", InvalidStepError, lambda: serving.attend(first)
    )
    serving.attend(second)


@pytest.mark.parametrize(
    "wrong", [None, 7, "step", object()], ids=["none", "number", "text", "object"]
)
def test_what_is_no_step_or_plan_is_refused(serving, wrong):
    plan = serving.plan()
    assert_refused(serving, "expected, got", InvalidStepError, lambda: serving.cache.begin(wrong))
    serving.cache.begin(plan)
    for not_a_step in (wrong, plan):
        assert_refused(
            serving, "expected, got", InvalidStepError, lambda s=not_a_step: serving.attend(s)
        )


def test_a_layer_stores_a_step_once(serving):
    plan = serving.plan()
    step = serving.cache.begin(plan)
    serving.attend(step)
    assert_refused(serving, "^layer 0 has stored", InvalidStepError, lambda: serving.attend(step))
    serving.attend(step, layer=1)


def test_after_a_step_that_lacks_layers_nothing_goes_on_until_all_is_forgotten(serving):
    manager = serving.manager
    plan = serving.plan()
    serving.attend(serving.cache.begin(plan))
    manager.commit(plan)
    lacking = r"step 0 .*nothing was stored in layers \[1\]"
    for _ in range(2):  # who tries again gets no further
        following = serving.plan()
        assert_refused(serving, lacking, InvalidStepError, partial(serving.cache.begin, following))
        manager.rollback(following)
        export = partial(export_sequence, serving.cache, manager, serving.seq_id)
        assert_refused(serving, lacking, InvalidStepError, export)
    manager.recover()
    serving.seq_id = manager.add_sequence()
    serving.run()
    serving.run()


def test_a_step_that_failed_halfway_and_was_rolled_back_is_done_again(serving):
    plan = serving.plan()
    serving.attend(serving.cache.begin(plan))
    serving.manager.rollback(plan)
    serving.run()
    serving.run()


@pytest.mark.parametrize("layer", [-1, 2, 10**30, 0.0, True, None, "0"], ids=repr)
def test_a_layer_that_is_not_there_is_refused(serving, layer):
    step = serving.cache.begin(serving.plan())
    assert_refused(serving, "layer must", ConfigError, lambda: serving.attend(step, layer))


def test_a_cache_has_one_manager(serving):
    other = serving.cache.new_manager(**LIMITS)
    theirs = other.reserve([other.add_sequence()], [3])
    plan = serving.plan()
    serving.cache.begin(plan)
    assert_refused(
        serving, "another block manager", InvalidStepError, lambda: serving.cache.begin(theirs)
    )
    seq_id = other.living_seq_ids[0]
    other.rollback(theirs)
    for call in (
        lambda: export_sequence(serving.cache, other, seq_id),
        lambda: import_sequence(serving.cache, other, b""),
        lambda: serving.cache.memory_stats(other),
    ):
        assert_refused(serving, "another block manager", InvalidStepError, call)


def test_whose_sequence_was_imported_is_the_manager(serving):
    serving.run()
    data = export_sequence(serving.cache, serving.manager, serving.seq_id)
    target = Serving.new()
    import_sequence(target.cache, target.manager, data)
    other = target.cache.new_manager(**LIMITS)
    assert_refused(
        target,
        "another block manager",
        InvalidStepError,
        lambda: import_sequence(target.cache, other, data),
    )
    assert len(other.living_seq_ids) == 0


def test_a_manager_of_other_blocks_is_refused(serving):
    small = PagedKVCache(LAYERS, num_blocks=39, dtype=torch.float32)
    plan = serving.plan()
    for cache in (small, PagedKVCache(LAYERS, num_blocks=40, dtype=torch.bfloat16)):
        if cache.geometry == serving.cache.geometry and cache.num_blocks == 40:
            continue
        with pytest.raises(InvalidStepError, match="cannot hand out"):
            cache.begin(plan)
    serving.cache.begin(plan)


SCORES = [
    {"scale": math.nan},
    {"scale": math.inf},
    {"scale": -0.5},
    {"scale": "1"},
    {"softcap": math.nan},
    {"softcap": math.inf},
    {"softcap": 0},
    {"softcap": -3.0},
    {"sliding_window": 0},
    {"sliding_window": 2.5},
    {"sliding_window": math.nan},
    {"attention_chunk": -1},
    {"attention_chunk": "64"},
    {"sink_logits": [0.0] * 4},
    {"sink_logits": torch.zeros(3)},
]


@pytest.mark.parametrize("options", SCORES, ids=str)
def test_scores_that_mean_nothing_are_refused(serving, options):
    step = serving.cache.begin(serving.plan())
    match = "|".join(options) + "|tensor"
    assert_refused(serving, match, ConfigError, lambda: serving.attend(step, **options))


def changed(index: int, change) -> tuple[Tensor, ...]:
    """New tokens, one of the three tensors changed."""
    given = list(tensors(3))
    given[index] = change(given[index])
    return tuple(given)


@pytest.mark.parametrize("index", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.requires_grad_(), "no backward pass"),
        (lambda t: t.to("meta"), "on cpu"),
        (lambda t: t.numpy(), "tensor was expected"),
        (lambda t: None, "expected|shape"),
        (lambda t: t.double(), "dtype"),
        (lambda t: t[:2], "shape"),
        (lambda t: t[0], "shape"),
    ],
    ids=["gradient", "meta", "numpy", "none", "double", "too few", "one"],
)
def test_tensors_that_do_not_fit_are_refused(serving, index, change, match):
    step = serving.cache.begin(serving.plan())
    given = changed(index, change)
    assert_refused(
        serving, match, ConfigError, lambda: paged_attention(*given, serving.cache, 0, step)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.complex64])
def test_numbers_of_other_kinds_are_refused(serving, dtype):
    step = serving.cache.begin(serving.plan())
    given = tensors(3, dtype=dtype)
    assert_refused(
        serving,
        "dtype|must be",
        ConfigError,
        lambda: paged_attention(*given, serving.cache, 0, step),
    )


def test_a_gradient_that_nobody_asks_for_is_no_matter(serving):
    step = serving.cache.begin(serving.plan())
    given = [tensor.requires_grad_() for tensor in tensors(3)]
    with torch.no_grad():
        assert not paged_attention(*given, serving.cache, 0, step).requires_grad


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_tensors_in_any_order_of_memory_give_the_same(backend):
    outputs, stored = [], []
    for change in (
        lambda t: t,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        serving = Serving.new(backend=backend)
        step = serving.cache.begin(serving.plan(200))
        given = [change(tensor) for tensor in tensors(200)]
        outputs.append(paged_attention(*given, serving.cache, 0, step))
        stored.append(serving.bytes())
    for output, arena in zip(outputs[1:], stored[1:], strict=True):
        torch.testing.assert_close(output, outputs[0])
        assert arena == stored[0]


@pytest.mark.parametrize("values", [[-1], np.array([3, -7], dtype=np.int32), [1 << 31], [0.5]])
def test_token_ids_that_no_vocabulary_has_are_refused(serving, values):
    manager = serving.manager
    seq_id = serving.seq_id
    for call in (
        lambda: manager.add_sequence(values),
        lambda: manager.chain_tokens(values),
        lambda: manager.append_tokens([seq_id], values, [len(values)]),
    ):
        with pytest.raises(PagedKVError, match="token ids"):
            call()
    assert manager.num_tokens.tolist() == [0, 0]
    assert manager.living_seq_ids.tolist() == [seq_id]


def test_a_format_may_be_given_by_its_name():
    by_name = LayerSpec(kv_format="int2", num_kv_heads=np.int64(1), key_dim=8, value_dim=8)
    assert by_name.kv_format.key_bits == 2
    assert type(by_name.num_kv_heads) is int
    with pytest.raises(ConfigError, match="'int5'"):
        LayerSpec(kv_format="int5", num_kv_heads=1, key_dim=8, value_dim=8)
