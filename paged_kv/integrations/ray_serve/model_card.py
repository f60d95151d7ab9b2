"""What a replica tells of its model to whoever reads requests to it. Knows no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...blocks.geometry import BlockGeometry
from ...blocks.sink_window import SinkWindow
from ...blocks.token_chain import TokenChain, as_token_ids, root_hash
from ...engine.intake import cache_keys
from ...engine.sampling_params import SamplingParams
from ...entrypoints.llm import LLM
from ...models.adapters import BASE_MODEL
from .order import PromptBlocks


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """A model as its requests see it, and the blocks that its prompts have."""

    tokenizer: PreTrainedTokenizerBase | None
    adapters: tuple[str, ...]
    active_adapters: tuple[str, ...]
    max_model_len: int
    sink_window: SinkWindow | None
    defaults: Mapping[str, Any]
    geometry: BlockGeometry
    fingerprint: bytes

    def completed(self, params: SamplingParams) -> SamplingParams:
        return params.completed(self.defaults)

    def max_prompt_tokens(self, params: SamplingParams) -> int | None:
        return None if params.sink_window or self.sink_window else self.max_model_len - 1

    def blocks_of(self, token_ids: Sequence[int], params: SamplingParams) -> PromptBlocks:
        """The blocks of a prompt that a replica may have, as its block manager names them.

        None of one whose tokens are looked at, which shares nothing, nor of a windowed one.
        """
        num_tokens = len(token_ids)
        window = params.sink_window or self.sink_window
        if params.prompt_logprobs is not None or window is not None:
            return PromptBlocks(num_tokens)
        name = params.adapter
        adapters = (name,) if name not in (None, BASE_MODEL) else ()
        keys = cache_keys(params, self.active_adapters if name is None else adapters)
        chain = TokenChain(as_token_ids(list(token_ids)), root_hash(self.fingerprint, keys))
        num_links = chain.num_shareable_links(self.geometry)
        chain.hash_links(self.geometry, num_links)
        ends = [self.geometry.link_end(link + 1) for link in range(num_links)]
        return PromptBlocks(num_tokens, chain.hashes, ends)


def card_of(llm: LLM) -> ModelCard:
    manager, intake = llm.engine.manager, llm.engine.intake
    return ModelCard(
        tokenizer=llm.tokenizer,
        adapters=llm.adapters,
        active_adapters=llm.engine.model.adapters.active,
        max_model_len=llm.max_model_len,
        sink_window=intake.sink_window,
        defaults=dict(intake.defaults),
        geometry=manager.geometry,
        fingerprint=manager.fingerprint,
    )
