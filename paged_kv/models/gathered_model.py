"""Any model with a transformers `Cache`, whose context is gathered from blocks for it.

For models whose attention cannot read blocks. Knows one sequence at a time: each computes its
tokens of a step by itself, with a cache that gives every layer its whole context, dequantized. What
is new goes to the blocks when all sequences are done: until then the step has changed nothing.

Many arguments because `forward` takes all that a step is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, LinearAttentionLayer

from ..blocks.geometry import IntArray
from ..cache.attention import store_tokens
from ..cache.formats import NATIVE
from ..cache.kv_cache import PagedKVCache, Step
from ..cache.stored_context import StoredContext
from ..errors import PagedKVError, UnsupportedModelError
from .active_step import Observer
from .adapters import TokenAdapters, applying
from .attached_model import AttachedModel, LayerShape, Route
from .huggingface import IMPLEMENTATION, has_unlisted_window
from .length_limit import find_length_limit
from .paged_layer import PagedLayer
from .recurrent_states import (
    HYBRID,
    KNOWN,
    NO_TOKENS,
    CacheLayer,
    HybridPagedLayer,
    RecurrentState,
    RecurrentStates,
)
from .rotary import Rotation
from .token_states import MODEL_ERRORS, layers_of_a_token

NARROW_WINDOW: Final = 4
REHEARSED_PIECES: Final = ((5, 2), (1, 1), (4, 7))  # tokens of two sequences in each step
UNSEEN: Final = "its attention is its own, and tells of no queries"
# How far logits of pieces may be from those of the whole, as a share of how much logits differ.
TOLERANCE: Final = 1e-3
HALF_TOLERANCE: Final = 0.2


class GatheredModel(AttachedModel):
    """A causal language model that computes with its own attention on what blocks hold.

    One sequence after the other, and the slower the longer their contexts are. Nothing of the model
    is replaced. Recurrent layers go on from the sequence's states (see `recurrent_states`).
    Windows, graphs and calibrations need attention of ours.
    """

    route: ClassVar[Route] = "gather"
    implementation: ClassVar[str | None] = None

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        cache: PagedKVCache,
        step: Step,
        adapters: TokenAdapters | None = None,
        observe: Observer | None = None,
    ) -> Tensor:
        if self.is_closed:
            raise PagedKVError("this LLM is closed")
        if observe is not None:
            raise UnsupportedModelError(f"{self._name} cannot be calibrated: {UNSEEN}")
        plan = step.source
        wanted = np.array(logit_rows.tolist(), dtype=np.int64)
        owners = np.searchsorted(plan.query_start_loc, wanted, side="right") - 1
        states = self._states.setdefault(cache, RecurrentStates())
        contexts, places, logits = [], [], []
        stored, bounds = StoredContext.of_step(cache, step), pairwise(plan.query_start_loc.tolist())
        for row, (start, end) in enumerate(bounds):
            length = int(plan.context_lens[row])
            state = NO_TOKENS
            if self.keeps_states:
                state = states.of(int(plan.seq_ids[row]), length)
            adapter = None if adapters is None else adapters.of_tokens[start]
            context = SequenceContext(cache, stored[row], length, state, adapter)
            own = np.flatnonzero(owners == row)
            contexts.append(context)
            places.append(own)
            logits.append(
                self._compute(
                    token_ids[start:end], positions[start:end], wanted[own] - start, context
                )
            )
        for layer in range(len(cache.layers)):
            keys, values = zip(*(context.new_tokens(layer) for context in contexts), strict=True)
            store_tokens(torch.cat(keys), torch.cat(values), cache, layer, step)
        for seq_id, context in zip(plan.seq_ids.tolist(), contexts, strict=True):
            if self.keeps_states:
                states.keep(seq_id, context.state_before, context.state)
        order = np.argsort(np.concatenate(places))
        return torch.cat(logits)[torch.from_numpy(order).to(cache.device)]

    @property
    def rotations(self) -> dict[int, Rotation]:
        raise UnsupportedModelError(f"{self._name} cannot be windowed: {UNSEEN}")

    def state_bytes(self, cache: PagedKVCache) -> int:
        states = self._states.get(cache)
        return 0 if states is None else states.num_bytes

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    def _compute(
        self, token_ids: Tensor, positions: Tensor, rows: IntArray, context: SequenceContext
    ) -> Tensor:
        """Logits [M, V] of the tokens `rows` [M] among new ones [L] of a sequence."""
        kept, logits = np.unique(rows), []
        num_tokens = len(token_ids)
        size = 1 if self._continues_singly and context.length else num_tokens
        for start in range(0, num_tokens, size):
            piece = slice(start, start + size)
            own = kept[(kept >= start) & (kept < start + size)] - start
            layers = self._layers_on(context)
            context.state.copied_to(layers)
            one_adapter = TokenAdapters.of_one(context.adapter, len(token_ids[piece]), len(own))
            with self._applying(one_adapter):
                cache = Cache(layers=layers)
                logits.append(self._call(token_ids[piece], positions[piece], own, cache))
            context.advance(size, layers)
        return torch.cat(logits)[torch.from_numpy(np.searchsorted(kept, rows)).to(self.device)]

    def _applying(self, adapters: TokenAdapters | None) -> AbstractContextManager[None]:
        keeps_logits = "logits_to_keep" in self._arguments
        return applying(self.model, adapters, keeps_logits=keeps_logits)

    @torch.inference_mode()
    def _try_adapters(self, adapters: TokenAdapters) -> None:
        positions = torch.arange(len(adapters.of_tokens), device=self.device)
        cache, last = DynamicCache(config=self.model.config), np.array([len(positions) - 1])
        with self._applying(adapters):
            self._call(positions, positions, last, cache)

    def _layers_on(self, context: SequenceContext) -> list[CacheLayer]:
        """Cache layers of a sequence: keys and values are those of its blocks."""
        layers: list[CacheLayer] = list(DynamicCache(config=self.model.config).layers)
        for place, number in enumerate(self.layer_shapes):
            layer = layers[number]
            if isinstance(layer, HYBRID):
                layers[number] = HybridPagedLayer(context, place, layer.number_of_states)
            else:
                layers[number] = PagedLayer(context, place)
        return layers

    def _call(self, token_ids: Tensor, positions: Tensor, rows: IntArray, cache: Cache) -> Tensor:
        kept = torch.from_numpy(rows).to(token_ids.device)
        known = {
            "attention_mask": token_ids.new_ones(1, cache.get_seq_length() + len(token_ids)),
            "position_ids": positions[None],
            "logits_to_keep": kept,
        }
        arguments: dict[str, Any] = {
            name: value for name, value in known.items() if name in self._arguments
        }
        logits: Tensor = self.model(
            input_ids=token_ids[None], past_key_values=cache, use_cache=True, **arguments
        ).logits
        return logits[0] if "logits_to_keep" in arguments else logits[0, kept]

    @torch.inference_mode()
    def _compute_alone(self, token_ids: Tensor) -> Tensor:
        """Logits [L, V] of a sequence [L] with the model's own cache, as `generate` does."""
        cache, prompt_length = DynamicCache(config=self.model.config), max(len(token_ids) - 2, 1)
        positions = torch.arange(len(token_ids), device=self.device)
        logits = [
            self._call(token_ids[piece], piece, np.arange(len(piece)), cache)
            for piece in (positions[:prompt_length], *positions[prompt_length:, None])
        ]
        return torch.cat(logits)

    def _probe(self) -> tuple[dict[int, LayerShape], int]:
        if self.model.config._attn_implementation == IMPLEMENTATION:
            raise UnsupportedModelError(
                f"{self._name} was given attention that reads blocks: give it another one"
            )
        layers = layers_of_a_token(self.model)
        for number, layer in enumerate(layers):
            if type(layer) not in KNOWN:
                raise UnsupportedModelError(
                    f"{self._name} stores a {type(layer).__name__} in layer {number}, which is "
                    "neither keys and values of every token nor a state of fixed size"
                )
        self.keeps_states: bool = any(isinstance(layer, LinearAttentionLayer) for layer in layers)
        shapes = {
            number: (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
            for number, layer in enumerate(layers)
            if getattr(layer, "keys", None) is not None
        }
        if not shapes:
            raise UnsupportedModelError(
                f"{self._name} stores no keys and values, so needs no blocks"
            )
        token = torch.zeros(1, dtype=torch.int64, device=self.device)
        try:
            return shapes, self._compute_alone(token).shape[-1]
        except MODEL_ERRORS as error:
            raise UnsupportedModelError(f"{self._name} cannot compute a token by itself") from error

    def _make_ready(self) -> None:
        """Rehearse what the engine will do, on two sequences in pieces.

        Layers that go on from a state may do so for one token only.
        """
        self._states: WeakKeyDictionary[PagedKVCache, RecurrentStates] = WeakKeyDictionary()
        self._continues_singly = False
        limit = find_length_limit(self.model).num_tokens
        ends = np.cumsum(REHEARSED_PIECES, axis=0)
        ends = ends[(ends <= (limit or ends[-1])).all(1)]
        if not len(ends) or self.device.type == "meta" or self._says_the_same(ends):
            return
        self._continues_singly = self.keeps_states
        if not self._continues_singly or not self._says_the_same(ends):
            raise UnsupportedModelError(
                f"{self._name} says something else where its tokens come in pieces: it sees later "
                "ones, or depends on more than keys, values and states of them"
            )

    def _says_the_same(self, ends: IntArray) -> bool:
        """Whether logits do not depend on pieces, with steps that go up to `ends` [steps, 2].

        Where a window is known by its mask alone, it is made so narrow that its edge is seen.
        """
        sequences = [torch.arange(1, end + 1, device=self.device) for end in ends[-1].tolist()]
        try:
            with narrow_window(self.model):
                expected = torch.cat([self._compute_alone(one) for one in sequences]).double()
                given = torch.cat(self._compute_in_pieces(sequences, ends)).double()
        except MODEL_ERRORS as error:
            raise UnsupportedModelError(f"{self._name} cannot compute tokens in pieces") from error
        spread = (expected - expected.mean(-1, keepdim=True)).norm()
        is_half = self.dtype in (torch.float16, torch.bfloat16)
        tolerance = HALF_TOLERANCE if is_half else TOLERANCE
        return not (given - expected).norm() > tolerance * spread  # NaN tells nothing

    def _compute_in_pieces(self, sequences: Sequence[Tensor], ends: IntArray) -> list[Tensor]:
        """Logits [L, V] of each sequence, computed on blocks, one step up to each of the `ends`."""
        most = int(ends.max())
        cache = PagedKVCache(
            self.layers(NATIVE),
            num_blocks=len(sequences) * -(-most // NATIVE.block_size),
            dtype=self.dtype,
            device=self.device,
        )
        manager = cache.new_manager(max_num_seqs=len(sequences), max_model_len=most)
        seq_ids = np.array([manager.add_sequence() for _ in sequences])
        found: list[list[Tensor]] = [[] for _ in sequences]
        for start, end in pairwise([np.zeros_like(ends[0]), *ends]):
            plan = manager.reserve(seq_ids, end - start)
            assert plan is not None, "room was made for all"
            step = cache.begin(plan, logit_tokens=np.arange(plan.num_tokens))
            token_ids = torch.cat(
                [one[a:b] for one, a, b in zip(sequences, start, end, strict=True)]
            )
            logits = self.forward(token_ids, step.positions, step.logit_tokens, cache, step)
            manager.commit(plan)
            for mine, (first, last) in zip(found, pairwise(plan.query_start_loc), strict=True):
                mine.append(logits[first:last])
        return [torch.cat(mine) for mine in found]


@contextmanager
def narrow_window(model: PreTrainedModel) -> Iterator[None]:
    """A sliding window that no list of layer types tells of is a few tokens wide."""
    config = model.config.get_text_config()
    if not has_unlisted_window(config):
        yield
        return
    width, config.sliding_window = config.sliding_window, NARROW_WINDOW
    try:
        yield
    finally:
        config.sliding_window = width


class SequenceContext:
    """What a sequence has stored, for one step, and what is new in it."""

    max_length = -1  # none, in transformers' words

    def __init__(
        self,
        cache: PagedKVCache,
        stored: StoredContext,
        length: int,
        state: RecurrentState,
        adapter: str | None,
    ) -> None:
        self._cache, self._stored, self._num_stored = cache, stored, length
        self._new: dict[int, tuple[Tensor, Tensor]] = {}  # [1, H, n, D]
        self.length: int = length  # with those new tokens that all layers have computed
        self.state_before: RecurrentState = state
        self.state: RecurrentState = state
        self.adapter = adapter  # None is what is active

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        earlier = self._new.get(layer)
        num_new = 0 if earlier is None else earlier[0].shape[2]
        if self._num_stored + num_new != self.length:
            raise UnsupportedModelError(f"layer {layer} does not store keys once for each token")
        if earlier is not None:
            key, value = (torch.cat(two, 2) for two in zip(earlier, (key, value), strict=True))
        self._new[layer] = key, value
        if not self._num_stored:
            return key, value
        new, length = (key, value), self._num_stored
        return self._stored.joined(self._cache, layer, new, length, is_padded=False)

    def advance(self, num_tokens: int, layers: Sequence[CacheLayer]) -> None:
        """All layers have computed so many tokens more, and know what these cache layers do."""
        self.length += num_tokens
        self.state = RecurrentState.of(self.length, layers)

    def new_tokens(self, layer: int) -> tuple[Tensor, Tensor]:
        """New keys and values [L, H, D] of a layer."""
        if layer not in self._new:
            raise UnsupportedModelError(f"layer {layer} stored no keys")
        key, value = (new[0].transpose(0, 1) for new in self._new[layer])
        return key, value
