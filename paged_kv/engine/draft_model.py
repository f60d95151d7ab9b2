"""Guesses of a smaller model, which has blocks of its own. Knows tokens, never requests."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import IntArray
from ..blocks.step_plan import StepPlan
from ..blocks.token_chain import TokenIds
from ..validation import require, require_count
from .model_runner import ModelRunner
from .prompt_lookup import MOST_TOKENS


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """Speculate what a smaller `model` of the same vocabulary says.

    It is a folder, a hub name or a loaded model, and takes what memory its weights and its cache
    need beside the other: that holds as many tokens as the other's pool, in full precision. A step
    tries at most `num_tokens` (1 to 64) of a sequence, and only as long as the step computes no
    more than `max_step_tokens` tokens in all.
    """

    model: str | Path | PreTrainedModel
    num_tokens: int = 4
    max_step_tokens: int = 32

    def __post_init__(self) -> None:
        is_model = isinstance(self.model, (str, Path, PreTrainedModel))
        require("model", self.model, is_model, "a folder, a hub name or a loaded model")
        require_count("num_tokens", self.num_tokens, most=MOST_TOKENS)
        require_count("max_step_tokens", self.max_step_tokens, least=2)


class DraftRunner:
    """A model that follows sequences by name and says what it would go on with.

    Its manager shares no prefixes, so that what turns out wrong can be cut off. A sequence for
    which no block is left has no guess; those that nobody asks for make room.
    """

    def __init__(
        self, runner: ModelRunner, manager: BlockManager, *, token_budget: int, vocab_size: int
    ) -> None:
        self._runner, self._manager = runner, manager
        self._token_budget = token_budget
        self._vocab_size = min(vocab_size, runner.model.vocab_size)
        self._seq_ids: dict[str, int] = {}
        self._is_within = False  # a call, which an exception may have cut off

    def close(self) -> None:
        """Give the model its own attention back."""
        self._runner.model.close()

    def guess(
        self, contexts: Mapping[str, TokenIds], counts: Mapping[str, int]
    ) -> dict[str, TokenIds]:
        """The `counts` likeliest tokens, one after another, behind each of these."""
        if self._is_within:
            self._manager.recover()
            self._seq_ids.clear()
        self._is_within = True
        followed = [name for name in counts if self._follow(name, contexts[name], contexts)]
        starts = {name: len(contexts[name]) for name in followed}
        while True:
            asked = [name for name in followed if name in self._seq_ids]
            pending = [n for n in asked if self._num_tokens(n) < starts[n] + counts[n]]
            if not pending:
                break
            self._step(pending, contexts)
        self._is_within = False
        return {
            name: self._manager.token_ids[self._seq_ids[name], starts[name] :][
                : counts[name]
            ].copy()
            for name in asked
        }

    def _num_tokens(self, name: str) -> int:
        return int(self._manager.num_tokens[self._seq_ids[name]])

    def _follow(self, name: str, token_ids: TokenIds, asked: Collection[str]) -> bool:
        """Let a sequence be these tokens, of which the last is still to be computed."""
        manager = self._manager
        longest = manager.max_model_len - MOST_TOKENS
        if len(token_ids) > longest or int(token_ids.max()) >= self._runner.model.vocab_size:
            return False
        if name not in self._seq_ids:
            if not manager.num_free_seqs and not self._make_room(asked):
                return False
            self._seq_ids[name] = manager.add_sequence()
        seq_id = self._seq_ids[name]
        stored = int(manager.num_computed_tokens[seq_id])
        most = min(stored, len(token_ids) - 1)
        differs = (manager.token_ids[seq_id, :most] != token_ids[:most]).nonzero()[0]
        manager.truncate(seq_id, int(differs[0]) if len(differs) else most)
        missing = token_ids[int(manager.num_tokens[seq_id]) :]
        manager.append_tokens([seq_id], missing, [len(missing)])
        return True

    def _make_room(self, asked: Collection[str]) -> bool:
        """Forget a sequence that nobody asks for now, if there is one."""
        for name in self._seq_ids:
            if name not in asked:
                self._manager.remove_sequence(self._seq_ids.pop(name))
                return True
        return False

    def _step(self, names: list[str], asked: Collection[str]) -> None:
        """Compute what these have not computed, as far as a step reaches; whose last, goes on."""
        manager = self._manager
        seq_ids: IntArray = np.array([self._seq_ids[name] for name in names], dtype=np.int64)
        left = manager.num_tokens[seq_ids] - manager.num_computed_tokens[seq_ids]
        before = np.cumsum(left) - left
        num_new = np.clip(self._token_budget - before, 0, left)
        seq_ids, num_new, left = (each[num_new > 0] for each in (seq_ids, num_new, left))
        plan = manager.reserve(seq_ids, num_new)
        while plan is None and self._make_room(asked):
            plan = manager.reserve(seq_ids, num_new)
        if plan is None:
            manager.remove_sequence(self._seq_ids.pop(names[-1]))
            return
        self._run(plan, num_new == left)

    def _run(self, plan: StepPlan, ends: np.ndarray) -> None:
        manager = self._manager
        token_ids = manager.token_ids[plan.seq_ids[plan.token_rows], plan.positions]
        last = plan.query_start_loc[1:][ends] - 1
        logits, _ = self._runner.run(plan, token_ids.astype(np.int64), last)
        manager.commit(plan)
        if len(last):
            likeliest = logits[:, : self._vocab_size].argmax(-1)
            manager.append_tokens(plan.seq_ids[ends], likeliest.to("cpu", torch.int32).numpy())
