"""One generation request as the scheduler sees it: token ids and limits, never text or tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.host_blocks import SwappedSequence
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.token_chain import ExtraKey, TokenChain, TokenIds, as_token_ids
from paged_kv.errors import InvalidRequestError
from paged_kv.validation import is_integer


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """A prompt and how far to continue it.

    Lower `priority` is served first, then earlier `arrival`, which the scheduler assigns. Requests
    share cached blocks only where their `extra_keys` are equal too: an adapter's name, the hash of
    an image, a tenant's salt.
    """

    request_id: str
    prompt_token_ids: Sequence[int] | TokenIds
    max_tokens: int
    priority: int = 0
    extra_keys: Sequence[ExtraKey] = ()
    sink_window: SinkWindow | None = None  # of a stream
    arrival: int = -1
    status: RequestStatus = RequestStatus.WAITING
    seq_id: int | None = None
    num_preemptions: int = 0
    times_passed: int = 0  # later requests that were admitted because this one did not fit
    num_prompt_tokens: int = field(init=False)
    # While it does not run: all its tokens, and its blocks if they lie in host memory.
    tokens: TokenChain = field(init=False, repr=False)
    swapped: SwappedSequence | None = field(default=None, init=False, repr=False)
    manager: BlockManager | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        token_ids = as_token_ids(self.prompt_token_ids)
        self.prompt_token_ids = token_ids
        self.num_prompt_tokens = len(token_ids)
        for name in ("priority", "max_tokens"):
            value = getattr(self, name)
            if not is_integer(value):
                raise InvalidRequestError(f"{name} must be an integer, got {value!r}")
            setattr(self, name, int(value))  # a numpy integer could overflow in a rank
        self.tokens = TokenChain(token_ids, root=b"")

    @property
    def has_arrived(self) -> bool:
        """Whether a scheduler knows it, or has known it."""
        return self.arrival >= 0

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller ranks are scheduled first and preempted last."""
        return self.priority, self.arrival

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        if self.seq_id is None:
            return len(self.tokens.token_ids)
        assert self.manager is not None
        return int(self.manager.num_tokens[self.seq_id])

    @property
    def token_ids(self) -> list[int]:
        """Prompt and output so far."""
        token_ids = self.tokens.token_ids
        if self.seq_id is not None:
            assert self.manager is not None
            token_ids = self.manager.token_ids[self.seq_id, : self.num_tokens]
        return [int(token_id) for token_id in token_ids.tolist()]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens
