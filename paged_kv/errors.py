"""Every exception that paged_kv raises on purpose. Knows messages, never state."""

from __future__ import annotations

from collections.abc import Sequence


class PagedKVError(Exception):
    """Base of all errors raised by paged_kv."""


class ConfigError(PagedKVError, ValueError):
    """A setting has a value that cannot work; the message names the value and what was expected."""


class InvalidRequestError(PagedKVError, ValueError):
    """A request cannot be served as asked; nothing was queued and other requests go on."""


class PromptTooLongError(InvalidRequestError):
    """A prompt, or a prompt and its output, is longer than the model or the pool allows."""


class OutOfBlocksError(PagedKVError, MemoryError):
    """The pool is too small for what was asked of it."""


class TransferError(PagedKVError, ValueError):
    """An exported sequence is corrupt or does not fit here; the message names what differs."""


class UnsupportedModelError(PagedKVError):
    """The model computes attention in a way that paged_kv cannot reproduce."""


class InvalidStepError(PagedKVError, ValueError):
    """A step is planned or ended out of turn, or with sequences or counts that cannot be."""


class ModelNotFoundError(PagedKVError, FileNotFoundError):
    """No model can be loaded from the given path or name."""


class NonFiniteLogitsError(PagedKVError, ArithmeticError):
    """The model produced NaN or infinite logits for a request; only that request ends."""


class StepFailedError(PagedKVError, RuntimeError):
    """A step raised an exception, which is the cause of this; the requests of that step end."""


class QueueFullError(PagedKVError, RuntimeError):
    """As many requests as may wait and run are there; nothing was queued."""


class ClosedError(PagedKVError, RuntimeError):
    """Who serves requests takes no more, or has ended one, because it is being closed."""


class RequestTimeoutError(PagedKVError, TimeoutError):
    """A request was not over within its time, and has ended."""


class NoAnswerError(PagedKVError, ConnectionError):
    """A server does not say how it is; it may do so later."""


class GenerationError(PagedKVError):
    """Some requests of a `generate` call failed while they ran.

    `outputs` holds what every request produced, the failed ones with their `error`.
    """

    def __init__(self, message: str, outputs: Sequence[object]) -> None:
        super().__init__(message)
        self.outputs = outputs


class MissingDependencyError(PagedKVError, ImportError):
    """An optional package is needed; the message says which extra to install."""
