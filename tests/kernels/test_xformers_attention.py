"""xformers' kernels for a chunk's attention to itself: themselves on a GPU, without one a stand-in.

The stand-in is called as they are, reads the very mask that they are given and answers in their
layout, so that what is ours runs: which calls go there, and the merge with attention to contexts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from paged_kv.cache.backend import choose_backend
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE
from tests.support import triton_fleet
from tests.support.attention_oracle import layer_of
from tests.support.triton_fleet import DEVICE, SINKS, check_step, ragged_fleet

fmha = pytest.importorskip("xformers.ops.fmha")

# Behind the line that skips all of this where xformers is missing.
from paged_kv.kernels.triton import xformers_attention  # noqa: E402

poison = triton_fleet.poison
pytestmark = triton_fleet.pytestmark
HAS_GPU = torch.cuda.is_available()


def stand_in(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float
) -> tuple[Tensor, Tensor]:
    """[1, T, H, G, D] each; outputs alike, log-sum-exps [1, H, G, T]."""
    assert query.shape == key.shape == value.shape
    assert query.dtype == key.dtype == value.dtype != torch.float32
    num_tokens, dtype = query.shape[1], query.dtype
    query, key, value = (tensor[0].permute(1, 2, 0, 3).float() for tensor in (query, key, value))
    scores = query @ key.mT * scale + mask.materialize((num_tokens, num_tokens))
    output = scores.softmax(-1) @ value
    output = output.permute(2, 0, 1, 3)[None]
    return output.to(dtype), scores.logsumexp(-1)[None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the queries that xformers was called with; its kernels are run on a GPU alone."""
    seen = []
    kernel = xformers_attention.memory_efficient_attention_partial if HAS_GPU else stand_in

    def noting(query: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
        seen.append(query.shape)
        output: tuple[Tensor, Tensor] = kernel(query, *others, **named)
        return output

    monkeypatch.setattr(xformers_attention, "memory_efficient_attention_partial", noting)
    choose = choose_backend
    monkeypatch.setattr(
        triton_fleet, "choose_backend", lambda device, name: choose(device, "xformers")
    )
    return seen


@pytest.mark.parametrize(
    ("kv_format", "options"),
    [
        (NATIVE, {}),
        (INT8, {}),
        (INT4, {"sink_logits": SINKS}),
        (INT2, {"scale": 0.3}),
    ],
    ids=["native", "int8", "int4-sink_logits", "int2-scale"],
)
def test_chunks_attend_to_themselves_by_xformers(kv_format, options, calls):
    """Two chunks, one of them first tokens, beside a decode; the output is rounded to bfloat16."""
    fleet, seq_ids = ragged_fleet(
        layer_of(kv_format, heads=2, key_dim=64, value_dim=64), (63, 300, 17),
        gqa_group=2, dtype=torch.bfloat16, new_tokens=70,
    )  # fmt: skip
    check_step(fleet, dict(zip(seq_ids, (20, 1, 67), strict=True)), **options)
    assert calls == [(1, 88, 2, 2, 64)]


@pytest.mark.parametrize(
    "options",
    [{"softcap": 3.0}, {"sliding_window": 100}, {"attention_chunk": 64}],
    ids=lambda options: "-".join(options),
)
def test_rules_that_xformers_does_not_know_stay_with_us(options, calls):
    fleet, seq_ids = ragged_fleet(layer_of(INT8), (63,), dtype=torch.bfloat16)
    check_step(fleet, dict.fromkeys(seq_ids, 35), **options)
    assert not calls


@pytest.mark.parametrize(
    ("dims", "dtype"),
    [((64, 32), torch.bfloat16), ((32, 32), torch.float32)],
    ids=str,
)
def test_tensors_that_xformers_does_not_know_stay_with_us(dims, dtype, calls):
    layer = layer_of(INT8, key_dim=dims[0], value_dim=dims[1])
    fleet, seq_ids = ragged_fleet(layer, (63,), dtype=dtype)
    check_step(fleet, dict.fromkeys(seq_ids, 35))
    assert not calls


def test_few_new_tokens_stay_with_us(calls):
    fleet, seq_ids = ragged_fleet(layer_of(INT8), (63, 200), dtype=torch.bfloat16)
    check_step(fleet, dict.fromkeys(seq_ids, 1))
    assert not calls


def test_a_part_that_is_off_is_seen(calls, monkeypatch):
    """Log-sum-exps to another base would weigh the parts wrongly."""
    attend = xformers_attention.memory_efficient_attention_partial

    def off(*tensors: Any, **named: Any) -> tuple[Tensor, Tensor]:
        output, log_sums = attend(*tensors, **named)
        return output, log_sums / 0.69

    monkeypatch.setattr(xformers_attention, "memory_efficient_attention_partial", off)
    with pytest.raises(AssertionError):
        test_chunks_attend_to_themselves_by_xformers(INT8, {}, calls)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter runs on a CPU")
def test_a_cpu_is_refused():
    from paged_kv.errors import ConfigError

    with pytest.raises(ConfigError, match="cannot run on device cpu"):
        choose_backend(torch.device("cpu"), "xformers")


def test_only_its_name_chooses_it(monkeypatch):
    monkeypatch.delenv("PAGED_KV_BACKEND")
    assert choose_backend(torch.device("cuda")).name == "triton"
    monkeypatch.setenv("PAGED_KV_BACKEND", "xformers")
    assert choose_backend(torch.device(DEVICE)).name == "xformers"
