"""What may come next of an output of a given form, token by token.

Knows grammars and tokens, never an engine. llguidance is imported when the first request asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidRequestError, MissingDependencyError
from .structured_output import StructuredOutput

MAX_COMPILED: Final = 64  # grammars that are kept


class GrammarCompiler:
    """Grammars over the tokens of one tokenizer; an output ends with one of `end_token_ids`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        vocab_size: int,
        end_token_ids: Sequence[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = list(end_token_ids)
        self._compiled: dict[tuple[str, str], Any] = {}  # that were asked for last

    def constrain(self, output: StructuredOutput, num_prompt_tokens: int) -> GrammarProcessor:
        """A processor for the tokens of one request.

        Raises `InvalidRequestError` for what is no grammar, or where no token could end it.
        """
        if self._tokenizer is None or not self._end_token_ids:
            lack = "a tokenizer" if self._tokenizer is None else "an end-of-sequence token"
            raise InvalidRequestError(f"structured output needs {lack}")
        matcher = self._compiled.pop(output.form, None) or self._compile(*output.form)
        self._compiled[output.form] = matcher  # as the newest
        if len(self._compiled) > MAX_COMPILED:
            del self._compiled[next(iter(self._compiled))]
        return GrammarProcessor(matcher.deep_copy(), num_prompt_tokens)

    def _compile(self, kind: str, text: str) -> Any:
        """A matcher that has read nothing; a large grammar takes a second."""
        vocabulary = self._vocabulary
        from llguidance import LLMatcher, grammar_from

        try:
            matcher = LLMatcher(vocabulary, grammar_from(cast(Any, kind), text), log_level=0)
        except ValueError as error:
            raise InvalidRequestError(f"structured_output: {error}") from error
        if matcher.is_error():
            raise InvalidRequestError(f"structured_output: {first_line(matcher.get_error())}")
        return matcher

    @cached_property
    def _vocabulary(self) -> Any:
        """llguidance's own tokenizer, which takes a second to make."""
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise MissingDependencyError(
                "structured output needs llguidance: pip install 'paged-kv[structured]'"
            ) from error
        return from_tokenizer(
            cast(Any, self._tokenizer), n_vocab=self._vocab_size, eos_token=self._end_token_ids
        )


def first_line(message: str) -> str:
    """What is wrong; behind it llguidance tells what it has parsed so far."""
    return message.partition("\n")[0]


class GrammarProcessor:
    """A logits processor of one sequence: it reads what was generated since it was called last."""

    def __init__(self, matcher: Any, num_prompt_tokens: int) -> None:
        self._matcher = matcher
        self._num_prompt_tokens = num_prompt_tokens
        self._num_read: int | None = 0  # None: what an exception cut off begins anew

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Ids [1, num_tokens] and logits [1, V], of which what cannot come next becomes -inf."""
        output = ids[0, self._num_prompt_tokens :].tolist()
        num_read, self._num_read = self._num_read, None
        if num_read is None:
            self._matcher.reset()
        self._matcher.consume_tokens(output[num_read or 0 :])
        self._num_read = len(output)
        if self._matcher.is_error():
            raise InvalidRequestError(f"structured_output: {first_line(self._matcher.get_error())}")
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        may_come = np.unpackbits(mask, count=logits.shape[1], bitorder="little").astype(np.bool_)
        is_excluded = torch.from_numpy(~may_come).to(logits.device)
        return logits.masked_fill(is_excluded[None], -torch.inf)
