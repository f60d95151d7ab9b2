"""Decode attention of other projects on given numbers, for bench_gpu_attention.py to compare with.

It knows how each of them wants its keys, values and pages, and how it is called; it times nothing.
Peers are torch itself, xformers 0.0.35, FlashInfer 0.6 and vLLM 0.33, each imported only when its
turn comes, and run as its own defaults have it; but FlashInfer with tensor cores, as it advises for
groups of query heads, a call that has not been run yet. Their pages are shuffled, and large enough
for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

PAGE_TOKENS = 128
Decode = Callable[[], Tensor]  # [B, Hq, D]


@dataclass(frozen=True)
class Contents:
    """Sequences of one length in contiguous K/V, and the query token of each."""

    query: Tensor  # [B, Hq, D], heads of a group beside each other
    keys: Tensor  # [B, H, S, D]
    values: Tensor

    @classmethod
    def random(
        cls, shape: tuple[int, int, int, int], group_size: int, device: torch.device
    ) -> Contents:
        """bf16 K/V of shape [B, H, S, D] in sixteen steps, so that int4 has to give the same."""
        batch, num_heads, _, head_dim = shape
        heads = batch, num_heads * group_size, head_dim
        return cls(
            query=torch.randn(heads, dtype=torch.bfloat16, device=device),
            keys=torch.randint(16, shape, dtype=torch.bfloat16, device=device) / 4 - 1.875,
            values=torch.randint(16, shape, dtype=torch.bfloat16, device=device) / 4 - 1.875,
        )

    @property
    def rows(self) -> Tensor:
        """The queries as [B, H, queries of a kv head, D]."""
        batch, num_heads, _, head_dim = self.keys.shape
        return self.query.view(batch, num_heads, -1, head_dim)


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[Contents], Decode]  # copies K/V to where the call wants them


def relative_error(output: Tensor, exact: Tensor) -> float:
    return float((output.float() - exact.float()).norm() / exact.float().norm())


# -- pages ----------------------------------------------------------------------------------------


def shuffled_page_table(contents: Contents) -> Tensor:
    """int32 [B, pages of a sequence]: ids of pages, all of a pool."""
    batch, _, context, _ = contents.keys.shape
    num_pages = -(-context // PAGE_TOKENS)
    ids = torch.randperm(batch * num_pages, device=contents.keys.device)
    return ids.view(batch, num_pages).int()


def into_pages(tokens: Tensor, page_table: Tensor) -> Tensor:
    """Tokens [B, H, S, D] in their pages: [pages of the pool, PAGE_TOKENS, H, D]."""
    num_missing = page_table.shape[1] * PAGE_TOKENS - tokens.shape[2]
    padded = functional.pad(tokens, (0, 0, 0, num_missing))
    pages = padded.transpose(1, 2).reshape(-1, PAGE_TOKENS, tokens.shape[1], tokens.shape[3])
    pool = torch.empty_like(pages, memory_format=torch.contiguous_format)
    pool[page_table.flatten()] = pages
    return pool


# -- torch ----------------------------------------------------------------------------------------


def prepare_sdpa(contents: Contents) -> Decode:
    rows, keys, values = contents.rows, contents.keys, contents.values
    return lambda: functional.scaled_dot_product_attention(rows, keys, values).flatten(1, 2)


def prepare_flex_attention(contents: Contents) -> Decode:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    batch, _, context, _ = contents.keys.shape
    page_table = shuffled_page_table(contents)
    num_pages, num_full = page_table.numel(), context // PAGE_TOKENS
    full_pages, last_pages = page_table[:, :num_full], page_table[:, num_full:]
    owner = torch.empty(num_pages, dtype=torch.int32, device=page_table.device)
    owner[page_table] = torch.arange(batch, dtype=torch.int32, device=page_table.device)[:, None]
    num_tokens = torch.full_like(owner, PAGE_TOKENS)
    num_tokens[last_pages] = context % PAGE_TOKENS

    def is_own(sequence: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
        page = token // PAGE_TOKENS
        return (owner[page] == sequence) & (token % PAGE_TOKENS < num_tokens[page])

    def blocks(pages: Tensor) -> tuple[Tensor, Tensor]:
        """How many, and which; these as wide as the pool, for BlockMask also inverts them."""
        count = torch.full((batch, 1, 1), pages.shape[1], dtype=torch.int32, device=pages.device)
        return count, functional.pad(pages, (0, num_pages - pages.shape[1]))[:, None, None]

    # Full pages are read without calling is_own.
    mask = BlockMask.from_kv_blocks(
        *blocks(last_pages),
        *blocks(full_pages),
        BLOCK_SIZE=PAGE_TOKENS,
        mask_mod=is_own,
        seq_lengths=(1, num_pages * PAGE_TOKENS),
    )

    def pool_of(tokens: Tensor) -> Tensor:
        """[1, H, tokens of the pool, D]"""
        return into_pages(tokens, page_table).flatten(0, 1).transpose(0, 1).contiguous()[None]

    # A shape is compiled anew, and torch gives up compiling what it has compiled eight times. On a
    # CPU that would need a C++ compiler.
    torch.compiler.reset()
    is_cuda = page_table.is_cuda
    attend = torch.compile(flex_attention, dynamic=False) if is_cuda else flex_attention
    query, keys, values = (
        contents.query[:, :, None],
        pool_of(contents.keys),
        pool_of(contents.values),
    )
    return lambda: attend(query, keys, values, block_mask=mask, enable_gqa=True)[:, :, 0]


# -- xformers -------------------------------------------------------------------------------------


def int4_rows(tokens: Tensor) -> Tensor:
    """xformers' int4 of [B, H, S, D], a group a row: int32 [B, H, S, 1 + D / 8].

    The first word of a row is its scale and its minimum in fp16, then come eight codes a word, both
    from the lowest bits up. Made a sequence at a time, because of the float32 in between.
    """
    nibbles = torch.arange(0, 32, 4, dtype=torch.int32, device=tokens.device)

    def of_sequence(sequence: Tensor) -> Tensor:
        lowest, highest = sequence.float().aminmax(dim=-1, keepdim=True)
        scale = (highest - lowest) / 15
        codes = ((sequence.float() - lowest) / scale).round().int()
        words = (codes.view(*codes.shape[:-1], -1, 8) << nibbles).sum(dim=-1, dtype=torch.int32)
        coefficients = torch.cat([scale, lowest], dim=-1).half().view(torch.int32)
        return torch.cat([coefficients, words], dim=-1)

    return torch.stack([of_sequence(sequence) for sequence in tokens])


def unchanged(tokens: Tensor) -> Tensor:
    return tokens


def prepare_split_k(contents: Contents, stored: Callable[[Tensor], Tensor]) -> Decode:
    from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask
    from xformers.ops.fmha.triton_splitk import FwOp, Inputs

    batch, _, context, _ = contents.keys.shape
    page_table = shuffled_page_table(contents)
    mask = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * batch,
        kv_seqlen=[context] * batch,
        block_tables=page_table,
        page_size=PAGE_TOKENS,
        device=page_table.device,
    )
    rows = contents.rows

    def pool_of(tokens: Tensor) -> Tensor:
        """[1, tokens of the pool, H, queries of a kv head, D]; a stride of 0: they share it."""
        pool = into_pages(stored(tokens), page_table).flatten(0, 1)
        return pool[None, :, :, None].expand(-1, -1, -1, rows.shape[2], -1)

    inputs = Inputs(rows[None], pool_of(contents.keys), pool_of(contents.values), attn_bias=mask)

    def decode() -> Tensor:
        output: Tensor = FwOp.apply(inputs, needs_gradient=False)[0]
        return output.view(contents.query.shape)

    return decode


# -- FlashInfer -----------------------------------------------------------------------------------


def prepare_flashinfer(contents: Contents) -> Decode:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    query, device = contents.query, contents.query.device
    batch, num_heads, context, head_dim = contents.keys.shape
    page_table = shuffled_page_table(contents)
    num_pages = page_table.shape[1]
    pages = tuple(into_pages(part, page_table) for part in (contents.keys, contents.values))
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    last_page = context - (num_pages - 1) * PAGE_TOKENS
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * num_pages,
        page_table.flatten(),
        torch.full((batch,), last_page, dtype=torch.int32, device=device),
        query.shape[1],
        num_heads,
        head_dim,
        PAGE_TOKENS,
        q_data_type=query.dtype,
        kv_data_type=query.dtype,
    )
    return lambda: wrapper.run(query, pages)


# -- vLLM -----------------------------------------------------------------------------------------


def prepare_unified_attention(contents: Contents) -> Decode:
    """As vLLM's Triton backend calls it: small batches are split in 16 segments, others are not."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    query, device = contents.query, contents.query.device
    batch, num_query_heads, head_dim = query.shape
    _, num_heads, context, _ = contents.keys.shape
    page_table = shuffled_page_table(contents)
    keys, values = (into_pages(part, page_table) for part in (contents.keys, contents.values))
    query_starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
    output = torch.empty_like(query)
    segments = batch, num_query_heads, 16
    segment_outputs = torch.empty(*segments, head_dim, dtype=torch.float32, device=device)
    segment_maxima, segment_sums = torch.empty(2, *segments, dtype=torch.float32, device=device)

    def decode() -> Tensor:
        unified_attention(
            q=query,
            k=keys,
            v=values,
            out=output,
            cu_seqlens_q=query_starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=context,
            softmax_scale=head_dim**-0.5,
            causal=True,
            window_size=(-1, -1),
            block_table=page_table,
            softcap=0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            seq_threshold_3D=128 // num_heads,
            num_par_softmax_segments=segments[-1],
            softmax_segm_output=segment_outputs,
            softmax_segm_max=segment_maxima,
            softmax_segm_expsum=segment_sums,
        )
        return output

    return decode


CONTIGUOUS = Peer("contiguous bf16 SDPA", prepare_sdpa)
PEERS = (
    CONTIGUOUS,
    Peer("paged bf16 flex_attention", prepare_flex_attention),
    Peer("paged bf16 xformers split-K", partial(prepare_split_k, stored=unchanged)),
    Peer("paged int4 xformers split-K", partial(prepare_split_k, stored=int4_rows)),
    Peer("paged bf16 FlashInfer", prepare_flashinfer),
    Peer("paged bf16 vLLM unified", prepare_unified_attention),
)
