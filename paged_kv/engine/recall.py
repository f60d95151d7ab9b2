"""Key-value pairs hidden in a text, and questions for them: what a cache forgets first.

Knows a tokenizer and places of tokens, never a model. A pair is a sentence that gives a name a
number; at the end of its context the sentence begins again, and the model has to go on with the
number, token by token. As the numbers are random, nothing else can tell them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ..blocks.geometry import IntArray
from ..errors import ConfigError

SENTENCE: Final = "\n\nThe phone number of {name} is"
NAMES: Final = (
    *("Amber", "Boston", "Cyrus", "Dublin", "Edward", "Florence", "Geneva"),
    *("Hector", "Isabel", "Jasper", "Kenya", "Lisbon", "Martha", "Nelson"),
)
NUM_DIGITS: Final = 5
# Tokens of each context, and how many pairs it holds: 14 together.
PAIRS_BY_LENGTH: Final = {800: 3, 1500: 3, 3000: 4, 6000: 4}


@dataclass(frozen=True, eq=False)
class RecallContext:
    """A text [L] with its questions, each followed by its answer at [start, end)."""

    token_ids: IntArray
    answers: tuple[tuple[int, int], ...]

    @property
    def answer_places(self) -> IntArray:
        """Places of all tokens of answers, ascending."""
        return np.concatenate([np.arange(*answer) for answer in self.answers])

    def num_recalled(self, choices: IntArray) -> int:
        """Answers of which every token is the likeliest one; `choices` [L] are those by place.

        The text goes on with the right answers, so a greedy continuation finds an answer just if
        each of its tokens is the first choice behind those before it.
        """
        is_right = choices == self.token_ids
        return sum(bool(is_right[start:end].all()) for start, end in self.answers)


def recall_contexts(
    tokenizer: PreTrainedTokenizerBase, filler: Sequence[int], *, max_length: int, seed: int = 0
) -> list[RecallContext]:
    """Contexts of 0.8K to 6K tokens of the text `filler`, with 14 pairs at random places.

    The same for the same seed and text. Contexts that are longer than `max_length` or than the
    text are left out, with their pairs; raises `ConfigError` where none is left.
    """
    random = np.random.default_rng(seed)
    contexts, names = [], list(random.permutation(NAMES))
    for length, num_pairs in PAIRS_BY_LENGTH.items():
        mine, names = names[:num_pairs], names[num_pairs:]
        numbers = ["".join(map(str, random.integers(0, 10, NUM_DIGITS))) for _ in mine]
        depths, order = random.random(num_pairs), random.permutation(num_pairs)
        if length <= min(max_length, len(filler)):
            pairs = [encode_pair(tokenizer, *pair) for pair in zip(mine, numbers, strict=True)]
            contexts.append(hidden_pairs(tokenizer, filler, length, pairs, depths, order))
    if not contexts:
        raise ConfigError(
            f"recall needs a text and a model of at least {min(PAIRS_BY_LENGTH)} tokens, got "
            f"{len(filler)} and {max_length}"
        )
    return contexts


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, name: str, number: str
) -> tuple[list[int], list[int]]:
    """Tokens of a sentence as far as its number, and of the number."""
    question = tokenizer.encode(SENTENCE.format(name=name), add_special_tokens=False)
    return question, tokenizer.encode(f" {number}", add_special_tokens=False)


def hidden_pairs(
    tokenizer: PreTrainedTokenizerBase,
    filler: Sequence[int],
    length: int,
    pairs: Sequence[tuple[list[int], list[int]]],
    depths: NDArray[np.float64],
    order: IntArray,
) -> RecallContext:
    """One context: text, with pairs at those depths (0 to 1) of it, then questions in an order."""
    closing = tokenizer.encode(".\n\n", add_special_tokens=False)
    num_added = sum(2 * (len(question) + len(answer) + len(closing)) for question, answer in pairs)
    ids: list[int] = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    room, used = length - num_added - len(ids), 0
    for index in np.argsort(depths):
        question, answer = pairs[index]
        place = int(depths[index] * room)
        ids += [*filler[used:place], *question, *answer, *closing]
        used = place
    ids += filler[used:room]
    answers = []
    for index in order:
        question, answer = pairs[index]
        ids += question
        answers.append((len(ids), len(ids) + len(answer)))
        ids += [*answer, *closing]
    return RecallContext(np.array(ids, dtype=np.int64), tuple(answers))
