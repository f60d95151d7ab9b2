"""How many tokens a step computes, and of whom. Knows counts, never requests or blocks."""

from __future__ import annotations

import numpy as np

from paged_kv.blocks.geometry import IntArray


def step_budget(num_new: IntArray, token_budget: int, most_beside_decodes: int | None) -> int:
    """Tokens of a step whose sequences have `num_new` [N] to compute.

    Where some of them decode, prompts get at most `most_beside_decodes` tokens.
    """
    num_decodes = int(np.count_nonzero(num_new == 1))
    if most_beside_decodes is None or not num_decodes:
        return token_budget
    return min(token_budget, num_decodes + most_beside_decodes)


def cut_to_budget(num_new: IntArray, budget: int, token_budget: int) -> IntArray | None:
    """Tokens [N] of each: decodes first, then prompts in order. None: decodes use up all that a
    step may have.

    What comes behind the budget's end may be negative.
    """
    is_decode = num_new == 1
    num_decodes = int(np.count_nonzero(is_decode))
    budget_left = budget - num_decodes
    if num_decodes >= token_budget:
        return None
    of_prompts = np.where(is_decode, 0, num_new)
    before = np.cumsum(of_prompts) - of_prompts
    return np.where(is_decode, 1, np.minimum(of_prompts, budget_left - before))
