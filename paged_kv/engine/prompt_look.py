"""Prompt tokens whose likelihood is wanted, as a step computes them. Knows steps, never logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..blocks.geometry import IntArray
from ..scheduler.step import ScheduledStep
from .live_request import LiveRequest
from .sampler import Look


@dataclass(eq=False, kw_only=True, slots=True)
class PromptLook(Look):
    """Of one request the tokens from `first_position` on."""

    live: LiveRequest
    first_position: int

    def tell(self) -> None:
        """Give the request what was found."""
        end = self.first_position + len(self.token_ids)
        self.live.prompt_logprobs[self.first_position : end] = self.logprobs


def looks_of(
    scheduled: ScheduledStep, lives: Mapping[str, LiveRequest]
) -> tuple[list[PromptLook], IntArray]:
    """What a step can tell of prompts, and the places among its tokens whose logits are needed.

    Those of the sequences that sample come first, then those of drafts. A token is told by the one
    before it, the first by none.
    """
    plan, sampled = scheduled.plan, scheduled.sampled_token_index
    looks: list[PromptLook] = []
    places: list[IntArray] = [sampled]
    if plan.num_draft_tokens is not None:
        places.append(scheduled.draft_token_index)
    first_row = sum(map(len, places))
    if plan.num_tokens == len(sampled):  # nobody is within a prompt
        return looks, sampled
    for index, seq_id in enumerate(plan.seq_ids.tolist()):
        request = scheduled.requests_by_seq_id[seq_id]
        live = lives.get(request.request_id)
        if live is None or live.params.prompt_logprobs is None:
            continue
        start, end = plan.query_start_loc[index : index + 2].tolist()
        position = int(plan.positions[start]) + 1
        count = min(end - start, request.num_prompt_tokens - position)
        if count > 0:
            token_ids: Sequence[int] = request.prompt_token_ids[position : position + count]
            looks.append(
                PromptLook(
                    first_row=first_row,
                    token_ids=[int(token_id) for token_id in token_ids],
                    count=live.params.prompt_logprobs,
                    live=live,
                    first_position=position,
                )
            )
            places.append(np.arange(start, start + count))
            first_row += count
    return looks, np.concatenate(places)
