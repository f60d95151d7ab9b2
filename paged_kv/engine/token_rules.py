"""What a request's options do to the logits that its next token is drawn from.

Knows options and tokens, never logits: what is simple becomes numbers, with which all rows of a
step are changed at once; the rest is left to transformers' own processors, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..blocks.geometry import IntArray
from ..blocks.token_chain import TokenIds
from .sampling_params import SamplingParams

Processor = Callable[[Any, Any], Tensor]  # ids [1, num_tokens] and logits [1, V]


class TokenNumbers(NamedTuple):
    """Tokens [K], each once, with numbers [N, K]."""

    token_ids: IntArray
    numbers: NDArray[np.float64]


class RowRules(NamedTuple):
    """What is done to one row of logits, in this order.

    `biases` are added. Of `penalties`, a token's logit is divided by the first number if it is
    positive and multiplied if not, then the second is subtracted. `processors` change the row,
    `forbidden_ids` become -inf, and `warpers` leave what is drawn from. Both of the functions are
    given `token_ids`, all of the sequence; None where there are none.
    """

    biases: TokenNumbers | None = None
    penalties: TokenNumbers | None = None
    processors: Sequence[Processor] = ()
    forbidden_ids: Sequence[int] = ()
    warpers: Sequence[Processor] = ()
    token_ids: Sequence[int] | None = None

    @property
    def changes_logits(self) -> bool:
        """Whether a row that could be drawn from may not be any more."""
        return bool(self.processors or self.forbidden_ids or self.warpers or self.penalties)

    @property
    def needs_tokens(self) -> bool:
        """Whether they depend on the sequence's last token."""
        return self.token_ids is not None or self.penalties is not None


NO_RULES: Final = RowRules()


@dataclass(eq=False)
class TokenRules:
    """The options of one request, made ready once."""

    params: SamplingParams
    end_token_ids: Sequence[int]
    biases: TokenNumbers | None
    suppressed_ids: Sequence[int]
    processors: Sequence[Processor]
    warpers: Sequence[Processor]
    counts: TokenCounts = field(init=False, default_factory=lambda: TokenCounts())

    def of_row(
        self,
        num_output: int,
        prompt_token_ids: Sequence[int] | TokenIds,
        output_token_ids: Sequence[int],
    ) -> RowRules:
        """For the next token of a sequence; of so many, the last may be on its way."""
        params = self.params
        forbidden = list(self.suppressed_ids)
        if num_output < params.least_tokens:
            forbidden += self.end_token_ids
        if num_output == 0 and params.begin_suppress_tokens:
            forbidden += params.begin_suppress_tokens
        penalties = None
        if self.has_penalties:
            self.counts.catch_up(prompt_token_ids, output_token_ids)
            penalties = self.counts.penalties(params)
        has_functions = bool(self.processors or self.warpers)
        if not (forbidden or self.biases or penalties or has_functions):
            return NO_RULES
        return RowRules(
            biases=self.biases,
            penalties=penalties,
            processors=self.processors,
            forbidden_ids=forbidden,
            warpers=self.warpers,
            token_ids=[*prompt_token_ids, *output_token_ids] if has_functions else None,
        )

    @property
    def needs_tokens(self) -> bool:
        """Whether what they do to a row depends on all tokens before it."""
        return bool(self.processors or self.warpers) or self.has_penalties

    @property
    def has_penalties(self) -> bool:
        params = self.params
        is_repetition = params.repetition_penalty not in (None, 1.0)
        return is_repetition or bool(params.frequency_penalty or params.presence_penalty)


class TokenCounts:
    """How often a sequence has each of its tokens, read as it grows."""

    def __init__(self) -> None:
        self._num_read: int | None = None  # of the tokens that were generated; None: begin anew
        self._places: dict[int, int] = {}  # of tokens, in the order in which they came
        self._generated: list[int] = []  # how often, at each place

    def catch_up(
        self, prompt_token_ids: Sequence[int] | TokenIds, output_token_ids: Sequence[int]
    ) -> None:
        """Read what has come since; what an exception cuts off is read from the beginning."""
        num_read, self._num_read = self._num_read, None
        if num_read is None:
            first_seen = dict.fromkeys(map(int, prompt_token_ids))
            self._places = {token_id: place for place, token_id in enumerate(first_seen)}
            self._generated, num_read = [0] * len(first_seen), 0
        for token_id in output_token_ids[num_read:]:
            place = self._places.setdefault(token_id, len(self._generated))
            if place == len(self._generated):
                self._generated.append(0)
            self._generated[place] += 1
        self._num_read = len(output_token_ids)

    def penalties(self, params: SamplingParams) -> TokenNumbers:
        generated = np.array(self._generated, dtype=np.float64)
        factors = np.full(len(generated), params.repetition_penalty or 1.0)
        amounts = params.frequency_penalty * generated
        amounts += params.presence_penalty * (generated > 0)
        token_ids: IntArray = np.array(list(self._places), dtype=np.int64)
        return TokenNumbers(token_ids, np.stack([factors, amounts]))


def rules_of(
    params: SamplingParams,
    end_token_ids: Sequence[int],
    model_ends: Sequence[int],
    num_prompt_tokens: int,
    max_tokens: int | None,
    further: Sequence[Processor] = (),
) -> TokenRules:
    """Of a request with completed options; `model_ends` are the model's own end tokens.

    `further` processors come last.
    """
    words = [list(map(int, word)) for word in params.bad_words_ids or ()]
    # As transformers has it: a word that is an end token alone is not bad.
    single = [word[0] for word in words if len(word) == 1 and word[0] not in model_ends]
    bias = params.logit_bias
    biases = None
    if bias:
        ids: IntArray = np.array(list(bias), dtype=np.int64)
        biases = TokenNumbers(ids, np.array([list(bias.values())], dtype=np.float64))
    return TokenRules(
        params=params,
        end_token_ids=sorted(end_token_ids),
        biases=biases,
        suppressed_ids=[*(params.suppress_tokens or ()), *single],
        processors=(
            *processors_of(params, words, model_ends, num_prompt_tokens, max_tokens),
            *params.logits_processors,
            *further,
        ),
        warpers=warpers_of(params),
    )


def processors_of(
    params: SamplingParams,
    words: list[list[int]],
    model_ends: Sequence[int],
    num_prompt_tokens: int,
    max_tokens: int | None,
) -> list[Processor]:
    """transformers' own, in the order of its `generate`."""
    found: list[Processor] = []
    if params.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(int(params.no_repeat_ngram_size)))
    long_words = [word for word in words if len(word) > 1]
    if long_words:
        found.append(NoBadWordsLogitsProcessor(long_words))
    if params.forced_bos_token_id is not None:
        found.append(ForcedBOSTokenLogitsProcessor(int(params.forced_bos_token_id)))
    forced = params.forced_eos_token_id
    if forced is not None and max_tokens is not None:
        ids = list(map(int, forced)) if isinstance(forced, Sequence) else int(forced)
        found.append(ForcedEOSTokenLogitsProcessor(num_prompt_tokens + max_tokens, ids))
    decay = params.exponential_decay_length_penalty
    if decay is not None and model_ends:
        start = int(decay[0]), float(decay[1])
        found.append(ExponentialDecayLengthPenalty(start, list(model_ends), num_prompt_tokens))
    return found


def warpers_of(params: SamplingParams) -> list[Processor]:
    """transformers' own, in its order; none where the usual limits do, which a step has at once."""
    typical_p = 1.0 if params.typical_p is None else float(params.typical_p)
    cutoffs = (params.epsilon_cutoff or 0.0) % 1, (params.eta_cutoff or 0.0) % 1
    is_usual = params.top_h is None and typical_p == 1 and cutoffs == (0, 0)
    if params.temperature is None or params.is_greedy or is_usual:
        return []
    top_k, top_p, min_p = params.limits
    found: list[Processor] = [TemperatureLogitsWarper(float(params.temperature))]
    if params.top_h is not None:
        found.append(TopHLogitsWarper(float(params.top_h)))
    if top_k:
        found.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        found.append(TopPLogitsWarper(top_p))
    if min_p:
        found.append(MinPLogitsWarper(min_p))
    if typical_p < 1:
        found.append(TypicalLogitsWarper(typical_p))
    if cutoffs[0]:
        found.append(EpsilonLogitsWarper(cutoffs[0]))
    if cutoffs[1]:
        found.append(EtaLogitsWarper(cutoffs[1]))
    return found


def processed(logits: Tensor, token_ids: Sequence[int], processors: Sequence[Processor]) -> Tensor:
    """One row of logits [V] after some processors, given all tokens of its sequence so far."""
    scores = logits[None]
    ids = torch.tensor([list(token_ids)], device=logits.device)
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0]
