"""Attention over paged, quantized blocks beside attention over contiguous fp32 K/V, in turn.

    python bench/bench_attention.py --threads 2 --json bench/results/attention_cpu.json

A decode case is `batch x context, query heads / kv heads, head_dim`: each sequence's last token
attends to itself and to all before it. Only `attend` on a prepared step is timed, for `seal` only
`store_tokens`, and for `append` what `attend_and_store` takes longer than `attend`; queries and new
K/V are float32. Block ids are shuffled, so that the blocks of a sequence lie anywhere in the arena.
Each sample takes the next layer, as a model does, and the other sides take their turns in between:
nobody finds their K/V in the processor's caches, but for `call`, a decode so small that only the
cost of calling is left.

The baselines have the same contents, and take turns with ours in one process:

- contiguous fp32 SDPA: torch's attention over [batch, kv heads, longest, head_dim], padded. Heads
  folded into query rows, `enable_gqa` and expanded K/V, boolean and additive masks are tried for
  each case; the fastest is the baseline, and its name is in the row.
- per-sequence SDPA: one call a sequence on K/V of exactly its length, heads folded.
- torch backend: the library's own fallback, on a cache with the same blocks.
- random 16 KB reads: how fast the threads read pieces at random places of 512 MB. Beside it stands
  what a decode has to read (codes, metadata, open tokens) over its time.
- contiguous fp32 copy, for `append`: the same tokens written into the contiguous K/V.

A sample counts if the system took no core from this process meanwhile (in long calls, at most one
each 10 ms), and if other processes used at most 4 % of the cores in its round of 0.3 s. Where too
few count within `--patience` seconds, the fastest third of all is taken, and the case of the row
ends in `(disturbed)`. All sides run on torch's threads: those of a second pool would fight them.

Errors are relative to attention in float64 over what the cache holds, dequantized in float64.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any

import bench_gpu_attention
import numba
import numpy as np
import torch
from report import Row, add_arguments, write_report
from torch import Tensor
from torch.nn import functional

from paged_kv.blocks.geometry import BlockGeometry, IntArray
from paged_kv.cache.formats import INT2, INT4, INT8, NATIVE, KVFormat
from paged_kv.cache.kv_cache import PagedKVCache, Step
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.kernels import naive
from paged_kv.kernels.cpu.native_code import address_of, fetch_add, load_long, store_long
from paged_kv.kernels.cpu.threads import run_worker
from paged_kv.kernels.eager.quantize import dequantize_keys, dequantize_values
from paged_kv.kernels.new_tokens import NewTokens
from paged_kv.kernels.rules import ScoreRules

FORMATS: dict[str, tuple[KVFormat, torch.dtype]] = {
    "native fp32": (NATIVE, torch.float32),
    "native bf16": (NATIVE, torch.bfloat16),
    "int8": (INT8, torch.bfloat16),
    "int4": (INT4, torch.bfloat16),
    "int2": (INT2, torch.bfloat16),
}
COLD_BYTES = 1 << 28  # of contiguous K/V over all layers, at least
MAX_LAYERS = 16
CHUNK = 256  # tokens of each sequence that are stored at once
NUM_CHECKED = 3  # sequences whose error is measured
PIECE_WORDS = (16 << 10) // 8
READ_BYTES = 1 << 27  # of one sample of random reads
BUFFER_BYTES = 1 << 29
ROUND_SECONDS = 0.3
MAX_FOREIGN_SHARE = 0.04
SWITCH_SECONDS = 0.01  # the kernel's own threads take a core about as often

OURS, PER_SEQUENCE = "ours", "per-sequence SDPA"
TORCH, READS, COPY = "torch backend", "random 16 KB reads", "contiguous fp32 copy"
ALONE = "ours, without storing"

OfLayer = Callable[[int], object]  # what is timed, on one layer
Attention = Callable[[int], Tensor]  # [T, Hq, D] of one layer
Sdpa = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # [B, Hq, L, D], K/V, mask


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences of these lengths, the last `num_new` tokens of each being the timed step's own."""

    kind: str  # decode, call, prefill, append or seal
    lengths: tuple[int, ...]
    heads: tuple[int, int]  # of queries and of K/V
    head_dim: int = 64
    num_new: int = 1
    is_cold: bool = True  # more layers than the processor's caches hold
    is_half: bool = False  # queries and K/V, other than in blocks, are bfloat16

    @property
    def contiguous(self) -> str:
        """What torch's own attention is called."""
        return f"contiguous {'bf16' if self.is_half else 'fp32'} SDPA"

    @property
    def tolerance(self) -> dict[str, float]:
        """Of two ways to compute the same."""
        return {"rtol": 2e-2, "atol": 2e-3} if self.is_half else {"rtol": 1e-3, "atol": 1e-4}

    @property
    def num_layers(self) -> int:
        if not self.is_cold:
            return 2
        layer_bytes = sum(self.lengths) * self.heads[1] * self.head_dim * 2 * 4
        return min(max(-(-COLD_BYTES // layer_bytes), 2), MAX_LAYERS)

    def context_lens(self, geometry: BlockGeometry) -> IntArray:
        """Tokens that are stored before the timed step; for `seal`, one fewer than seal a block."""
        if self.kind != "seal":
            return np.array(self.lengths) - self.num_new
        full = geometry.num_head_tokens + geometry.block_size + geometry.min_tail_tokens
        assert full <= min(self.lengths)
        return np.full(len(self.lengths), full - 1)


def ragged_lengths(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    """Log-uniform lengths, both ends among them."""
    bounds = np.log(shortest), np.log(longest)
    lengths = np.exp(np.random.default_rng(0).uniform(*bounds, count)).astype(int)
    return (shortest, *lengths[1:-1].tolist(), longest)


CASES = {
    "16x2048 8/2 64": Case(kind="decode", lengths=(2048,) * 16, heads=(8, 2)),
    "64x512 8/8 64": Case(kind="decode", lengths=(512,) * 64, heads=(8, 8)),
    "4x8192 32/8 128": Case(kind="decode", lengths=(8192,) * 4, heads=(32, 8), head_dim=128),
    "32 ragged 16-4096 8/2 64": Case(
        kind="decode", lengths=ragged_lengths(32, 16, 4096), heads=(8, 2)
    ),
    "prefill chunk 512 on 4096 context": Case(
        kind="prefill", lengths=(4608,), heads=(8, 2), num_new=512
    ),
    "prefill chunk 512 on 4096 context, in bf16": Case(
        kind="prefill", lengths=(4608,), heads=(8, 2), num_new=512, is_half=True
    ),
    "append 64 sequences": Case(kind="append", lengths=(120,) * 64, heads=(8, 8)),
    "seal 64 blocks": Case(kind="seal", lengths=(320,) * 64, heads=(8, 8)),
    "call 1x16 1/1 64": Case(kind="call", lengths=(16,), heads=(1, 1), is_cold=False),
}
QUICK_CASES = {
    "4x512 8/2 64": Case(kind="decode", lengths=(512,) * 4, heads=(8, 2), is_cold=False),
    "8 ragged 16-512 8/2 64": Case(
        kind="decode", lengths=ragged_lengths(8, 16, 512), heads=(8, 2), is_cold=False
    ),
    "prefill chunk 64 on 448 context": Case(
        kind="prefill", lengths=(512,), heads=(8, 2), num_new=64, is_cold=False
    ),
    "append 8 sequences": Case(kind="append", lengths=(300,) * 8, heads=(8, 2), is_cold=False),
    "seal 8 blocks": Case(kind="seal", lengths=(320,) * 8, heads=(8, 2), is_cold=False),
    "call 1x16 1/1 64": CASES["call 1x16 1/1 64"],
}


# -- sampling on a machine that others use --------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How many undisturbed samples of each function are wanted, and for how long."""

    num_wanted: int
    limit_seconds: float


@dataclass(frozen=True)
class Timing:
    seconds: float  # the median of what was kept
    num_undisturbed: int
    num_taken: int
    is_undisturbed: bool


@dataclass(frozen=True)
class Sample:
    seconds: float
    is_undisturbed: bool


def take_turns(
    functions: dict[str, OfLayer], num_layers: int, sampling: Sampling
) -> dict[str, Timing]:
    """Time the functions A B C, B C A, ..., a layer each turn, until enough samples count."""
    for layer in range(2):  # compiles, and touches memory for the first time
        for function in functions.values():
            function(layer % num_layers)
    samples: dict[str, list[Sample]] = {name: [] for name in functions}
    turns = count()
    deadline = time.perf_counter() + sampling.limit_seconds
    while time.perf_counter() < deadline:
        wait_for_quiet(1.0)
        for name, taken in one_round(functions, turns, num_layers).items():
            samples[name] += taken
        num_kept = [sum(s.is_undisturbed for s in taken) for taken in samples.values()]
        if min(num_kept) >= sampling.num_wanted:
            break
    return {name: summary(taken, sampling.num_wanted) for name, taken in samples.items()}


def one_round(
    functions: dict[str, OfLayer], turns: Iterator[int], num_layers: int
) -> dict[str, list[Sample]]:
    """As many turns as fill a round; all of its samples are disturbed if other processes worked.

    Another function begins each turn: whoever runs first after a pause is disturbed the least.
    """
    names = list(functions)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    for turn in turns:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(timed(functions[name], turn % num_layers))
        wall = time.perf_counter() - start
        if wall > ROUND_SECONDS:
            break
    foreign = busy_seconds() - busy - (time.process_time() - own)
    if is_quiet(foreign, wall):
        return samples
    return {name: [Sample(s.seconds, False) for s in taken] for name, taken in samples.items()}


def is_quiet(foreign_seconds: float, wall_seconds: float) -> bool:
    """Whether what others used of the cores in this time is little."""
    return foreign_seconds <= MAX_FOREIGN_SHARE * wall_seconds * (os.cpu_count() or 1)


def wait_for_quiet(limit_seconds: float) -> None:
    """Sleep until others leave the cores alone, so as not to sample, and to disturb, in vain."""
    end = time.perf_counter() + limit_seconds
    while time.perf_counter() < end:
        busy = busy_seconds()
        time.sleep(0.1)
        if is_quiet(busy_seconds() - busy, 0.1):
            return


def timed(function: OfLayer, layer: int) -> Sample:
    switches = involuntary_switches()
    start = time.perf_counter()
    function(layer)
    seconds = time.perf_counter() - start
    num_switches = involuntary_switches() - switches
    return Sample(seconds, num_switches <= seconds // SWITCH_SECONDS)


def involuntary_switches() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def busy_seconds() -> float:
    """What all processes together used of the cores since the machine started."""
    with open("/proc/stat") as lines:
        user, nice, system, _idle, _wait, *interrupts_and_steal = lines.readline().split()[1:9]
    ticks = sum(map(int, (user, nice, system, *interrupts_and_steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


def summary(samples: list[Sample], num_wanted: int) -> Timing:
    """The median of the undisturbed samples; of the fastest third of all where they are too few."""
    kept = [sample.seconds for sample in samples if sample.is_undisturbed]
    num_undisturbed = len(kept)
    if num_undisturbed < num_wanted:
        kept = sorted(sample.seconds for sample in samples)[: -(-len(samples) // 3)]
    is_undisturbed = num_undisturbed >= num_wanted
    return Timing(float(np.median(kept)), num_undisturbed, len(samples), is_undisturbed)


# -- contents, and attention over them where they are contiguous ----------------------------------


@dataclass(frozen=True)
class Contents:
    """What all sides hold, layer by layer: B sequences of up to S tokens, and T queries."""

    keys: list[Tensor]  # [B, H, S, D], padding behind each sequence's end
    values: list[Tensor]
    queries: list[Tensor]  # [T, Hq, D] of the timed step

    @classmethod
    def random(cls, case: Case) -> Contents:
        generator = torch.Generator().manual_seed(0)
        num_seqs, num_layers = len(case.lengths), range(case.num_layers)
        stored = num_seqs, case.heads[1], max(case.lengths), case.head_dim
        asked = num_seqs * case.num_new, case.heads[0], case.head_dim
        dtype = torch.bfloat16 if case.is_half else torch.float32

        def some(shape: tuple[int, ...]) -> Tensor:
            return empty(shape).normal_(generator=generator).to(dtype)

        return cls(
            keys=[some(stored) for _ in num_layers],
            values=[some(stored) for _ in num_layers],
            queries=[some(asked) for _ in num_layers],
        )

    def tokens(self, layer: int, rows: IntArray, positions: IntArray) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H, D] of these tokens of these sequences."""
        row_ids, token_ids = torch.from_numpy(rows), torch.from_numpy(positions)
        return self.keys[layer][row_ids, :, token_ids], self.values[layer][row_ids, :, token_ids]


def empty(shape: tuple[int, ...]) -> Tensor:
    """Memory from numpy, which asks for huge pages, as the cache's is: they read faster."""
    return torch.from_numpy(np.empty(shape, dtype=np.float32))


def visible_tokens(case: Case) -> Tensor | None:
    """[B, 1, L, S] True where a new token attends; None where each attends to all there is."""
    new = torch.arange(case.num_new)[None, None, :, None]
    first = torch.tensor(case.lengths)[:, None, None, None] - case.num_new
    visible = torch.arange(max(case.lengths)) <= first + new
    return None if visible.all() else visible


def masks(case: Case) -> dict[str, Tensor | None]:
    visible = visible_tokens(case)
    if visible is None:
        return {"": None}
    additive = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
    return {", boolean mask": visible, ", additive mask": additive}


def folded_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The heads of a group become query rows of their kv head; `mask` has a row for each."""
    rows = query.reshape(len(key), key.shape[1], -1, query.shape[3])
    output = functional.scaled_dot_product_attention(rows, key, value, attn_mask=mask)
    return output.view(query.shape)


def gqa_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )


def expanded_sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """A copy of each kv head for every query head of its group, made in each call."""
    group_size = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group_size, dim=1) for tensor in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def contiguous_attention(
    case: Case, contents: Contents, sdpa: Sdpa, mask: Tensor | None, layer: int
) -> Tensor:
    query = contents.queries[layer]
    query = query.view(-1, case.num_new, *query.shape[1:]).transpose(1, 2)  # [B, Hq, L, D]
    output = sdpa(query, contents.keys[layer], contents.values[layer], mask)
    return output.transpose(1, 2).flatten(0, 1)


def contiguous_variants(case: Case, contents: Contents) -> dict[str, Attention]:
    """Every way to ask torch for the same attention."""
    variants: dict[str, Attention] = {}
    group_size = case.heads[0] // case.heads[1]
    for suffix, mask in masks(case).items():
        folded_mask = None if mask is None else mask.repeat(1, 1, group_size, 1)
        ways: dict[str, tuple[Sdpa, Tensor | None]] = {"folded heads": (folded_sdpa, folded_mask)}
        if group_size > 1:
            ways |= {"enable_gqa": (gqa_sdpa, mask), "expanded heads": (expanded_sdpa, mask)}
        for name, (sdpa, its_mask) in ways.items():
            attention = partial(contiguous_attention, case, contents, sdpa, its_mask)
            variants[name + suffix] = attention
    return variants


def fastest_contiguous(
    name: str, case: Case, contents: Contents, sampling: Sampling
) -> tuple[str, Attention]:
    """The way that takes torch the least time here, all of them being equal in what they return."""
    variants = contiguous_variants(case, contents)
    outputs = [attention(0) for attention in variants.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], **case.tolerance)
    if len(variants) == 1:
        return next(iter(variants.items()))
    timings = take_turns({**variants}, case.num_layers, sampling)
    report_timings(f"{name}, {case.contiguous}", timings)
    best = min(timings, key=lambda variant: timings[variant].seconds)
    return best, variants[best]


def per_sequence_attention(case: Case, contents: Contents) -> Attention:
    """One call for each sequence, on K/V of exactly its length."""

    def exact(padded: Tensor) -> list[Tensor]:
        sizes = [case.heads[1] * length * case.head_dim for length in case.lengths]
        parts = empty((sum(sizes),)).split(sizes)  # type: ignore[no-untyped-call]
        return [
            part.view(1, case.heads[1], length, case.head_dim).copy_(padded[row, :, :length])
            for row, (part, length) in enumerate(zip(parts, case.lengths, strict=True))
        ]

    keys, values = ([exact(layer) for layer in kv] for kv in (contents.keys, contents.values))

    def attend_each(layer: int) -> Tensor:
        query = contents.queries[layer][:, :, None]
        outputs = [
            folded_sdpa(query[row : row + 1], keys[layer][row], values[layer][row], None)
            for row in range(len(case.lengths))
        ]
        return torch.cat(outputs)[:, :, 0]

    return attend_each


# -- paged caches ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paged:
    """A cache that holds the contexts of a case, and the step that is timed on it."""

    cache: PagedKVCache
    step: Step
    contents: Contents
    new_keys: list[Tensor]  # [T, H, D] by layer
    new_values: list[Tensor]

    def attend(self, layer: int) -> Tensor:
        query = self.contents.queries[layer]
        key, value = self.new_keys[layer], self.new_values[layer]
        return attend(self.cache, layer, query, key, value, self.step)

    def attend_and_store(self, layer: int) -> None:
        self.cache.backend.attend_and_store(
            NewTokens(self.contents.queries[layer], self.new_keys[layer], self.new_values[layer]),
            self.cache.records[layer],
            self.step.plan,
            ScoreRules(self.cache.layers[layer].key_dim ** -0.5),
        )

    def store(self, layer: int) -> None:
        store(self.cache, layer, self.new_keys[layer], self.new_values[layer], self.step)


def attend(
    cache: PagedKVCache, layer: int, query: Tensor, key: Tensor, value: Tensor, step: Step
) -> Tensor:
    """The attention call of the cache's backend, nothing around it."""
    rules = ScoreRules(query.shape[-1] ** -0.5)
    new = NewTokens(query, key, value)
    return cache.backend.attend(new, cache.records[layer], step.plan, rules)


def store(cache: PagedKVCache, layer: int, keys: Tensor, values: Tensor, step: Step) -> None:
    """The store call of the cache's backend."""
    new = NewTokens(keys, keys, values)  # no query is stored
    cache.backend.store_tokens(new, cache.records[layer], step.inputs)


def new_cache(case: Case, label: str, backend: str) -> PagedKVCache:
    kv_format, dtype = FORMATS[label]
    layer = LayerSpec(
        kv_format=kv_format,
        num_kv_heads=case.heads[1],
        key_dim=case.head_dim,
        value_dim=case.head_dim,
    )
    geometry = cache_geometry([layer], dtype)
    spare = CHUNK // geometry.open_block_size + 4  # what a step may take before it gives back
    num_blocks = sum(geometry.max_blocks(length) + spare for length in case.lengths)
    layers = [layer] * case.num_layers
    return PagedKVCache(layers, num_blocks=num_blocks, dtype=dtype, backend=backend)


def fill(case: Case, contents: Contents, caches: list[PagedKVCache]) -> list[Paged]:
    """Store the contexts in all caches, in the same scattered blocks, and begin the timed step."""
    manager = caches[0].new_manager(max_num_seqs=len(case.lengths), max_model_len=max(case.lengths))
    free_ids = manager.pool.allocate(manager.num_free_blocks)
    manager.pool.release(np.random.default_rng(1).permutation(free_ids))
    seq_ids = np.array([manager.add_sequence() for _ in case.lengths])
    remaining = case.context_lens(manager.geometry)
    while remaining.any():
        rows = np.flatnonzero(remaining)
        counts = remaining[rows].clip(max=CHUNK)
        plan = manager.reserve(seq_ids[rows], counts)
        assert plan is not None
        steps = [cache.begin(plan) for cache in caches]
        for layer in range(case.num_layers):
            keys, values = contents.tokens(layer, rows[plan.token_rows], plan.positions)
            for cache, step in zip(caches, steps, strict=True):
                store(cache, layer, keys, values, step)
        manager.commit(plan)
        remaining[rows] -= counts
    plan = manager.reserve(seq_ids, np.full(len(seq_ids), case.num_new))
    assert plan is not None
    assert case.kind != "append" or not len(plan.seal_block_ids)
    new = [
        contents.tokens(layer, plan.token_rows, plan.positions) for layer in range(case.num_layers)
    ]
    new_keys, new_values = [pair[0] for pair in new], [pair[1] for pair in new]
    return [Paged(cache, cache.begin(plan), contents, new_keys, new_values) for cache in caches]


def needed_bytes(paged: Paged) -> int:
    """What attention has to read of one layer's arena: sealed sections and open tokens."""
    indices, layer = paged.step.inputs, paged.cache.layers[0]
    layout = layer.record_layout(paged.cache.dtype)
    num_sealed = int(indices.num_sealed.sum())
    num_open_tokens = int(indices.context_lens_host.sum()) - num_sealed * indices.block_size
    sealed_bytes = num_sealed * sum(layout.section_bytes.values())
    return layer.num_kv_heads * (sealed_bytes + num_open_tokens * layout.token_bytes)


# -- errors ---------------------------------------------------------------------------------------


def relative_error(values: Tensor, exact: Tensor) -> float:
    return float((values.double() - exact).norm() / exact.norm())


def attention_error(paged: Paged) -> float:
    """Against float64 attention over the dequantized cache, on layer 0 and some sequences."""
    indices = paged.step.inputs
    last = len(indices.query_lens) - 1
    rows = np.unique(np.linspace(0, last, NUM_CHECKED).astype(int))
    new = NewTokens(paged.contents.queries[0], paged.new_keys[0], paged.new_values[0])
    rules = ScoreRules(new.query.shape[-1] ** -0.5)
    starts, found = indices.query_start_loc.tolist(), paged.attend(0)
    parts = []
    for row in rows.tolist():
        tokens = slice(starts[row], starts[row + 1])
        output = naive.attend_sequence(new, paged.cache.records[0], indices, row, rules)
        parts.append((found[tokens], output))
    return relative_error(*(torch.cat(side) for side in zip(*parts, strict=True)))


def stored_tokens(paged: Paged) -> Tensor:
    """Whatever the step wrote to layer 0, in float64: appended tokens and dequantized blocks."""
    indices, records = paged.step.inputs, paged.cache.records[0]
    block_ids = indices.stored_slots // indices.open_block_size
    offsets = indices.stored_slots % indices.open_block_size
    parts = [blocks[block_ids, :, offsets] for blocks in (records.open_keys, records.open_values)]
    ids, sealed = indices.seal_block_ids, records.sealed
    if len(ids):
        assert sealed is not None
        blocks = sealed.at(ids)
        parts += [
            dequantize_keys(blocks, records.key_bits, records.wide_channels, torch.float64),
            dequantize_values(blocks, records.value_bits, torch.float64),
        ]
    return torch.cat([part.double().flatten() for part in parts])


# -- how fast the threads can read ----------------------------------------------------------------


@numba.cfunc(numba.void(numba.types.voidptr))
def read_pieces(parameters: Any) -> None:
    """Draws groups of eight pieces, and adds up all words of a group: a sum for each.

    The eight are read in step: one alone would wait for its next page again and again.
    """
    address = address_of(parameters)
    counter, groups, num_groups, sums = (
        load_long(address, 0),
        load_long(address, 1),
        load_long(address, 2),
        load_long(address, 3),
    )
    index = fetch_add(counter)
    while index < num_groups:
        a, b = load_long(groups, 8 * index), load_long(groups, 8 * index + 1)
        c, d = load_long(groups, 8 * index + 2), load_long(groups, 8 * index + 3)
        e, f = load_long(groups, 8 * index + 4), load_long(groups, 8 * index + 5)
        g, h = load_long(groups, 8 * index + 6), load_long(groups, 8 * index + 7)
        total = 0
        for word in range(PIECE_WORDS):
            total += load_long(a, word) + load_long(b, word) + load_long(c, word)
            total += load_long(d, word) + load_long(e, word) + load_long(f, word)
            total += load_long(g, word) + load_long(h, word)
        store_long(sums, index, total)
        index = fetch_add(counter)


def random_reads(num_threads: int) -> OfLayer:
    """Reads the next `READ_BYTES` of a buffer, in pieces at random places, on torch's threads."""
    words = np.ones(BUFFER_BYTES // 8, dtype=np.int64)
    starts = np.random.default_rng(2).permutation(len(words) // PIECE_WORDS) * PIECE_WORDS
    groups = (words.ctypes.data + 8 * starts).reshape(-1, 8)
    parts = cycle(np.split(groups, BUFFER_BYTES // READ_BYTES))
    counter, sums = np.zeros(1, dtype=np.int64), np.zeros(len(groups), dtype=np.int64)
    worker = read_pieces.address
    assert worker is not None

    def read_next(layer: int) -> None:
        part = next(parts)
        counter[0] = 0
        addresses = [counter.ctypes.data, part.ctypes.data, len(part), sums.ctypes.data]
        parameters = np.array(addresses, dtype=np.int64)
        run_worker(worker, int(parameters.ctypes.data), num_threads)
        assert sums[: len(part)].sum() == READ_BYTES // words.itemsize

    return read_next


# -- rows -----------------------------------------------------------------------------------------


def report_timings(title: str, timings: dict[str, Timing]) -> None:
    print(title, flush=True)
    for name, timing in timings.items():
        counts = f"{timing.num_undisturbed} of {timing.num_taken} samples undisturbed"
        note = "kept" if timing.is_undisturbed else "too few; the fastest third kept"
        print(f"  {name:36} {timing.seconds * 1e6:12.1f} us  {counts}, {note}", flush=True)


def on_other_layers(function: OfLayer, num_layers: int) -> OfLayer:
    """So that it does not find in the caches what the other side has just read."""
    return lambda layer: function((layer + num_layers // 2) % num_layers)


def longer_by(whole: Timing, part: Timing) -> Timing:
    """What a call takes longer than another that it contains."""
    return Timing(
        seconds=whole.seconds - part.seconds,
        num_undisturbed=min(whole.num_undisturbed, part.num_undisturbed),
        num_taken=min(whole.num_taken, part.num_taken),
        is_undisturbed=whole.is_undisturbed and part.is_undisturbed,
    )


def time_rows(
    case: str, metric: str, timings: dict[str, Timing], baselines: dict[str, str]
) -> list[Row]:
    """Our microseconds beside each baseline's; `baselines` maps timings to the names they go by."""
    ours = timings[OURS]
    rows = []
    for key, name in baselines.items():
        is_undisturbed = ours.is_undisturbed and timings[key].is_undisturbed
        row = Row(
            case=case if is_undisturbed else f"{case} (disturbed)",
            metric=metric,
            value=ours.seconds * 1e6,
            unit="us",
            baseline=name,
            baseline_value=timings[key].seconds * 1e6,
            ratio=timings[key].seconds / ours.seconds,
        )
        rows.append(row)
    return rows


def bandwidth_row(case: str, num_bytes: int, timings: dict[str, Timing]) -> Row:
    """What our attention has to read over its time, as a share of what reading alone does."""
    ours, reads = timings[OURS], timings[READS]
    is_undisturbed = ours.is_undisturbed and reads.is_undisturbed
    value, limit = num_bytes / ours.seconds / 1e9, READ_BYTES / reads.seconds / 1e9
    return Row(
        case=case if is_undisturbed else f"{case} (disturbed)",
        metric="needed bytes read",
        value=value,
        unit="GB/s",
        baseline=READS,
        baseline_value=limit,
        ratio=value / limit,
    )


@dataclass(frozen=True)
class Bench:
    """What all cases share."""

    labels: list[str]
    sampling: Sampling
    read_next: OfLayer

    def attention_rows(self, name: str, case: Case) -> list[Row]:
        contents = Contents.random(case)
        variant, contiguous = fastest_contiguous(name, case, contents, self.sampling)
        functions: dict[str, OfLayer] = {case.contiguous: contiguous}
        baselines = {case.contiguous: f"{case.contiguous}, {variant}", TORCH: TORCH}
        if case.kind == "decode":
            functions |= {
                PER_SEQUENCE: per_sequence_attention(case, contents),
                READS: self.read_next,
            }
            baselines[PER_SEQUENCE] = PER_SEQUENCE
        rows = []
        for label in self.labels:
            ours, fallback = self.fill(case, contents, label)
            if label == "native fp32":
                torch.testing.assert_close(ours.attend(0), contiguous(0), **case.tolerance)
            sides = {OURS: ours.attend, **functions, TORCH: fallback.attend}
            timings = take_turns(sides, case.num_layers, self.sampling)
            title = f"{name}, {label}"
            report_timings(title, timings)
            rows += time_rows(title, f"{case.kind} us", timings, baselines)
            if case.kind == "decode":
                rows.append(bandwidth_row(title, needed_bytes(ours), timings))
            error = attention_error(ours) * 1e6
            rows.append(Row(case=title, metric="relative error", value=error, unit="ppm"))
        return rows

    def store_rows(self, name: str, case: Case) -> list[Row]:
        contents = Contents.random(case)
        rows = []
        for label in self.labels:
            if case.kind == "seal" and FORMATS[label][0].is_native:
                continue
            ours, fallback = self.fill(case, contents, label)
            sides: dict[str, OfLayer] = {OURS: ours.store, TORCH: fallback.store}
            if case.kind == "append":
                sides[OURS] = ours.attend_and_store
                sides[ALONE] = on_other_layers(ours.attend, case.num_layers)
                sides[COPY] = contiguous_copy(case, ours)
            timings = take_turns(sides, case.num_layers, self.sampling)
            title = f"{name}, {label}"
            report_timings(title, timings)
            if case.kind == "append":
                timings[OURS] = longer_by(timings[OURS], timings.pop(ALONE))
            baselines = {side: side for side in timings if side != OURS}
            rows += time_rows(title, f"{case.kind} us", timings, baselines)
            error = relative_error(stored_tokens(ours), stored_tokens(fallback)) * 1e6
            metric = f"difference from {TORCH}"
            rows.append(Row(case=title, metric=metric, value=error, unit="ppm"))
        return rows

    def fill(self, case: Case, contents: Contents, label: str) -> list[Paged]:
        """The CPU backend's cache and the torch backend's, with the same contents."""
        caches = [new_cache(case, label, backend) for backend in ("cpu", "torch")]
        return fill(case, contents, caches)

    def rows(self, name: str, case: Case) -> list[Row]:
        if case.kind in ("append", "seal"):
            return self.store_rows(name, case)
        return self.attention_rows(name, case)


def contiguous_copy(case: Case, paged: Paged) -> OfLayer:
    """Writes the step's new tokens where they belong in the contiguous K/V."""
    rows = torch.arange(len(case.lengths))
    positions = paged.step.inputs.cache_positions
    contents = paged.contents

    def copy(layer: int) -> None:
        contents.keys[layer][rows, :, positions] = paged.new_keys[layer]
        contents.values[layer][rows, :, positions] = paged.new_values[layer]

    return copy


def chosen(names: Iterable[str], terms: str | None) -> list[str]:
    """The names that contain any of these comma-separated terms; all of them without terms."""
    return [name for name in names if terms is None or any(t in name for t in terms.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda runs bench_gpu_attention.py instead, which knows --quick and --json only",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--formats", help="parts of their names, such as native,int8")
    parser.add_argument("--cases", help="parts of their names, such as 16x2048,ragged")
    parser.add_argument("--patience", type=float, help="seconds to wait for undisturbed samples")
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        bench_gpu_attention.run(arguments.quick, arguments.json)
        return
    cases = QUICK_CASES if arguments.quick else CASES
    names, labels = chosen(cases, arguments.cases), chosen(FORMATS, arguments.formats)
    if not names or not labels:
        parser.error(f"cases are {list(cases)}, formats are {list(FORMATS)}")
    num_wanted, patience = (3, 0.5) if arguments.quick else (15, 30.0)
    torch.set_num_threads(arguments.threads)
    bench = Bench(
        labels=labels,
        sampling=Sampling(num_wanted, arguments.patience or patience),
        read_next=random_reads(arguments.threads),
    )
    rows = [row for name in names for row in bench.rows(name, cases[name])]
    write_report("attention", rows, arguments.json)


if __name__ == "__main__":
    main()
