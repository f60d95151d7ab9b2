"""One generation request as the scheduler sees it: token ids and limits, never text or tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class RequestStatus(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """`token_ids` are prompt and output; the first `num_prompt_tokens` are the prompt.

    Lower `priority` is served first, then earlier `arrival`, which the scheduler assigns.
    """

    request_id: str
    token_ids: list[int]
    max_tokens: int
    priority: int = 0
    arrival: int = -1
    status: RequestStatus = RequestStatus.WAITING
    slot: int | None = None
    num_preemptions: int = 0
    num_prompt_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.token_ids)  # it grows: never the caller's own list
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller ranks are scheduled first and preempted last."""
        return self.priority, self.arrival

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens
