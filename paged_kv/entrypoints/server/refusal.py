"""What a server refuses by itself. Knows statuses, never what else an engine may raise."""

from __future__ import annotations

from ...errors import PagedKVError


class Refusal(PagedKVError):
    """A request that is not served: an HTTP status, and OpenAI's `code` and `param` where known."""

    def __init__(
        self, message: str, status: int = 400, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
