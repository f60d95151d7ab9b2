"""Workloads from traces: a line of JSON for each request. Knows lines, never a model.

    {"timestamp": 1500, "input_length": 700, "output_length": 64, "hash_ids": [46, 47]}
    {"timestamp": 2250, "prompt": "Once upon a time", "output_length": 64}

`timestamp` is in milliseconds, 0 where there is none and none is needed; what a line holds beside
these fields is ignored. A `prompt` is text or token ids. Without one, `input_length` tokens are
made up: of `hash_ids` each names the contents of a block of 512 tokens, the last of what is left,
as in the traces of Mooncake (Qin et al. 2024, arXiv:2407.00079), so that prompts with the same ids
in front begin alike; without `hash_ids` all differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Final

import numpy as np

from ..errors import InvalidRequestError
from ..validation import MAX_COUNT, is_finite, is_integer, is_list_of
from .workloads import WorkItem, Workload

HASHED_TOKENS: Final = 512  # tokens that one of `hash_ids` stands for
MAX_LENGTH: Final = 1 << 24
MAX_TIME: Final = 10**15  # milliseconds: any date of a clock
Encode = Callable[[str], list[int]]


def read_trace(
    lines: Iterable[str],
    num_vocab: int,
    *,
    seed: int = 0,
    encode: Encode | None = None,
    most: int | None = None,
    needs_times: bool = False,
) -> Workload:
    """The first `most` requests by their place in the file, then in the order of arrival.

    The first arrives at 0. Raises `InvalidRequestError` with the number of a wrong line; with
    `needs_times` one without a timestamp is wrong.
    """
    found = []
    for number, line in islice(enumerate(lines, 1), most):
        if not line.strip():
            continue
        try:
            record = record_of(line)
            if needs_times and "timestamp" not in record:
                raise ValueError('it has no "timestamp", and there is no --rate')
            found.append(work_item(record, number, num_vocab, seed, encode))
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"line {number} of the trace: {error}") from error
    if not found:
        raise InvalidRequestError("the trace has no requests")
    found.sort(key=lambda item: item.arrival)
    return [item._replace(arrival=item.arrival - found[0].arrival) for item in found]


def record_of(line: str) -> dict[str, Any]:
    """Raises `ValueError` for what is no object of JSON, or was no UTF-8."""
    try:
        line.encode()
        record = json.loads(line)
    except UnicodeEncodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"it must be an object, got {line.strip()[:40]!r}")
    return record


def work_item(
    record: dict[str, Any], number: int, num_vocab: int, seed: int, encode: Encode | None
) -> WorkItem:
    """Raises `ValueError` for a line that is no request."""
    timestamp = record.get("timestamp", 0)
    if not is_finite(timestamp) or not 0 <= timestamp <= MAX_TIME:
        raise ValueError(
            f'"timestamp" must be milliseconds, at least 0 and at most {MAX_TIME}, got '
            f"{timestamp!r}"
        )
    num_outputs = count_of(record, "output_length")
    if "prompt" in record:
        prompt = tokens_of(record["prompt"], num_vocab, encode)
    else:
        prompt = made_up(record, number, num_vocab, seed)
    return WorkItem(timestamp / 1000, prompt, num_outputs)


def count_of(record: dict[str, Any], name: str) -> int:
    value: Any = record.get(name)
    if not is_integer(value) or not 1 <= int(value) <= MAX_LENGTH:
        raise ValueError(f'"{name}" must be a number of tokens, at least 1, got {value!r}')
    return int(value)


def tokens_of(prompt: Any, num_vocab: int, encode: Encode | None) -> list[int]:
    if isinstance(prompt, str) and prompt:
        if encode is None:
            raise ValueError('a "prompt" of text needs a model with a tokenizer')
        return encode(prompt)
    if not prompt or not is_list_of(prompt, lambda t: is_integer(t) and 0 <= int(t) < num_vocab):  # type: ignore[call-overload]
        raise ValueError(f'"prompt" must be text, or token ids below {num_vocab}')
    return list(map(int, prompt))


def made_up(record: dict[str, Any], number: int, num_vocab: int, seed: int) -> list[int]:
    """Random tokens, which the ids of blocks decide as far as there are any."""
    length, has_ids = count_of(record, "input_length"), "hash_ids" in record
    ids, num_blocks = record.get("hash_ids", []), -(-length // HASHED_TOKENS)
    if not is_list_of(ids, lambda i: is_integer(i) and 0 <= int(i) <= MAX_COUNT):  # type: ignore[call-overload]
        raise ValueError('"hash_ids" must be a list of integers')
    if has_ids and len(ids) != num_blocks:
        raise ValueError(
            f'"hash_ids" must be {num_blocks}, one for every {HASHED_TOKENS} of {length} tokens, '
            f"got {len(ids)}"
        )
    tokens: list[int] = []
    for block in ids:
        rng = np.random.default_rng((seed, 0, int(block)))
        tokens += rng.integers(num_vocab, size=HASHED_TOKENS).tolist()
    rest = np.random.default_rng((seed, 1, number))
    tokens += rest.integers(num_vocab, size=max(length - len(tokens), 0)).tolist()
    return tokens[:length]
