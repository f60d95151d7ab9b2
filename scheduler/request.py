"""One generation request as the scheduler sees it: token ids and limits, never text or tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

import numpy as np

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.block_tables import StoredLengths
from paged_kv.blocks.host_blocks import SwappedSequence
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.token_chain import ExtraKey, TokenChain, TokenIds, as_token_ids, root_hash
from paged_kv.errors import InvalidRequestError
from paged_kv.validation import is_integer, require_instance

MAX_TOKENS: Final = 1 << 62

# Steps of waiting that a level of priority is worth: whoever waits is passed only by requests that
# arrive within so many steps for each level between them.
AGING_STEPS: Final = 500


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True)
class Branching:
    """A request that goes on as several sequences, as a beam search does.

    They are admitted, preempted and ended together: it starts when there is room for all of them,
    and starts again with its prompt when it was preempted.
    """

    max_seqs: int  # at once
    max_blocks: int  # that they hold at once

    def __post_init__(self) -> None:
        for name in ("max_seqs", "max_blocks"):
            value = getattr(self, name)
            if not is_integer(value) or value < 1:
                raise InvalidRequestError(f"{name} must be an integer of at least 1, got {value!r}")


@dataclass(frozen=True, eq=False)
class BroughtBlocks:
    """Blocks that a request begins with, computed elsewhere: what each group of layers stores.

    Whoever runs the model knows what the `records` are, and writes them.
    """

    lengths: tuple[StoredLengths, ...]
    records: object


@dataclass(eq=False)
class Request:
    """A prompt and how far to continue it.

    Lower `priority` is served first, then earlier `arrival`, which the scheduler assigns; but one
    level of priority is worth no more than `AGING_STEPS` steps of waiting. Requests
    share cached blocks only where their `extra_keys` are equal too: an adapter's name, the hash of
    an image, a tenant's salt. `max_tokens` None is without end, which takes a `sink_window`. What
    `adapters` its tokens are computed with is for who runs the model.
    """

    request_id: str
    prompt_token_ids: Sequence[int] | TokenIds
    max_tokens: int | None
    priority: int = 0
    extra_keys: Sequence[ExtraKey] = ()
    sink_window: SinkWindow | None = None
    branching: Branching | None = None
    adapters: tuple[str, ...] = ()  # their names
    arrival: int | None = field(default=None, init=False)
    turn: int = field(default=0, init=False)  # its step of arrival, moved by its priority
    status: RequestStatus = field(default=RequestStatus.WAITING, init=False)
    seq_ids: list[int] = field(default_factory=list, init=False)  # while it runs
    is_paused: bool = field(default=False, init=False)  # it keeps its place and computes nothing
    is_held: bool = field(default=False, init=False)  # it waits, and does not start
    num_shared_tokens: int = field(default=0, init=False)  # that it began with, in others' blocks
    num_hit_tokens: int | None = field(default=None, init=False)  # of its prompt, the first time
    is_retried: bool = field(default=False, init=False)  # because what it shared may be spoilt
    num_preemptions: int = 0
    times_passed: int = 0  # later requests that were admitted because this one did not fit
    num_prompt_tokens: int = field(init=False)
    # While it does not run: all its tokens, of a branching one the prompt; and its blocks, if they
    # lie in host memory.
    tokens: TokenChain = field(init=False, repr=False)
    brought: BroughtBlocks | None = field(default=None, init=False, repr=False)  # until it starts
    swapped: SwappedSequence | None = field(default=None, init=False, repr=False)
    manager: BlockManager | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require_instance("request_id", self.request_id, str, InvalidRequestError)
        if self.sink_window is not None:
            require_instance("sink_window", self.sink_window, SinkWindow, InvalidRequestError)
        if self.branching is not None:
            require_instance("branching", self.branching, Branching, InvalidRequestError)
        root_hash(b"", self.extra_keys)  # or it raises
        token_ids = as_token_ids(self.prompt_token_ids)
        self.prompt_token_ids = token_ids
        self.num_prompt_tokens = len(token_ids)
        if not is_integer(self.priority):
            raise InvalidRequestError(f"priority must be an integer, got {self.priority!r}")
        self.priority = int(self.priority)  # a numpy integer could overflow in a rank
        if self.max_tokens is not None:
            if not is_integer(self.max_tokens):
                raise InvalidRequestError(f"max_tokens must be an integer, got {self.max_tokens!r}")
            if self.max_tokens > MAX_TOKENS:
                raise InvalidRequestError(
                    f"max_tokens must be at most {MAX_TOKENS}, got {self.max_tokens}"
                )
            self.max_tokens = int(self.max_tokens)
        self.tokens = TokenChain(token_ids, root=b"")

    def bring(self, output_token_ids: Sequence[int], brought: BroughtBlocks) -> None:
        """It was begun elsewhere: it has these output tokens, and blocks of all before the last.

        Before a scheduler knows it.
        """
        self.restart(output_token_ids)
        self.brought = brought

    def restart(self, output_token_ids: Sequence[int] = ()) -> None:
        """Back to where no scheduler knows it, with so many output tokens already.

        For one whose scheduler had to `recover`, to be added to it again.
        """
        prompt = as_token_ids(self.prompt_token_ids)
        tokens = np.concatenate([prompt, as_token_ids(output_token_ids)])
        self.tokens = TokenChain(tokens, root=b"")
        self.arrival, self.manager, self.swapped, self.seq_ids = None, None, None, []
        self.status, self.is_paused, self.times_passed = RequestStatus.WAITING, False, 0
        self.is_held = False

    @property
    def may_be_retried(self) -> bool:
        """Whether, if what is computed for it is not finite, that may be the fault of others."""
        is_single = self.status is RequestStatus.RUNNING and self.branching is None
        return is_single and self.num_shared_tokens > 0 and not self.is_retried

    @property
    def stands_still(self) -> bool:
        """Whether it gets nothing until somebody says so."""
        return self.is_paused or self.is_held

    @property
    def is_unfinished(self) -> bool:
        return self.status is not RequestStatus.FINISHED

    @property
    def has_arrived(self) -> bool:
        """Whether a scheduler knows it, or has known it."""
        return self.arrival is not None

    @property
    def seq_id(self) -> int | None:
        """Of its sequence, or the first of them; None while it does not run."""
        return self.seq_ids[0] if self.seq_ids else None

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller ranks are scheduled first and preempted last."""
        assert self.arrival is not None, "a scheduler ranks those that it knows"
        return self.turn, self.arrival

    @property
    def step_of_arrival(self) -> int:
        return self.turn - self.priority * AGING_STEPS

    def arrive(self, arrival: int, step: int) -> None:
        """It is the scheduler's `arrival`th request and came in so many steps; its rank stays."""
        self.arrival, self.turn = arrival, self.priority * AGING_STEPS + step

    def began_with(self, num_tokens: int) -> None:
        """Its sequence has started, with so many tokens in blocks that others computed."""
        self.num_shared_tokens = num_tokens
        if self.num_hit_tokens is None:
            self.num_hit_tokens = num_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        if self.seq_id is None:
            return len(self.tokens.token_ids)
        assert self.manager is not None
        return int(self.manager.num_tokens[self.seq_id])

    @property
    def known_tokens(self) -> TokenIds:
        """Prompt and output so far, as an array that the next step may overwrite."""
        if self.seq_id is None:
            return self.tokens.token_ids
        assert self.manager is not None
        return self.manager.token_ids[self.seq_id, : self.num_tokens]

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        return [int(token_id) for token_id in self.known_tokens.tolist()]

    @property
    def is_decoding(self) -> bool:
        """Whether it runs, and one token alone is left to compute."""
        if self.seq_id is None or self.is_paused or self.branching is not None:
            return False
        assert self.manager is not None
        stored = self.manager.num_computed_tokens + self.manager.num_evicted_tokens
        return bool(stored[self.seq_id] + 1 == self.num_tokens)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def waits_at_limit(self) -> bool:
        """Whether it has all its tokens, and waits: a fork that found no sequence free."""
        if self.seq_ids or self.max_tokens is None:
            return False
        return self.num_output_tokens >= self.max_tokens
