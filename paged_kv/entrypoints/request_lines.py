"""Lines of a batch job as requests, each checked by itself: a bad one says what is wrong with it.

Knows JSONL and the fields of a request; never files, models or what comes back.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

from ..engine.sampling_params import SamplingParams
from ..engine.structured_output import StructuredOutput
from ..errors import InvalidRequestError, PagedKVError
from ..validation import is_integer, is_list_of

if TYPE_CHECKING:
    from .llm import LLM

SAMPLING_FIELDS: Final = frozenset(
    {field.name for field in fields(SamplingParams)} - {"logits_processors", "sink_window"}
)
ECHOED_FIELDS: Final = ("id", "prompt", "messages")
MAX_DEPTH: Final = 100
BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """A request as it was written, or what is wrong with it. `number` counts from 1."""

    number: int
    record: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def name(self) -> str:
        """What its user calls it."""
        has_id = "id" in self.record
        return f"request {self.number}" + (
            f" (id {reprlib.repr(self.record['id'])})" if has_id else ""
        )

    @property
    def echo(self) -> dict[str, Any]:
        """What a result repeats of its request."""
        return {key: self.record[key] for key in ECHOED_FIELDS if key in self.record}


def json_lines(source: Iterable[bytes]) -> Iterator[Line]:
    """Lines of a JSONL file; blank ones are skipped."""
    for number, raw in enumerate(source, start=1):
        content = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
        if content.strip():
            yield json_line(number, content)


def json_line(number: int, content: bytes) -> Line:
    try:
        record = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        return Line(number, error=f"line {number} is not UTF-8: {error}")
    except (ValueError, RecursionError) as error:
        return Line(number, error=f"line {number} is not JSON: {error}")
    if not isinstance(record, dict):
        text = content.strip()[:60].decode("utf-8", "replace")
        return Line(number, error=f"line {number} is not a JSON object: {text}")
    return checked_line(number, record)


def refuse_constant(name: str) -> NoReturn:
    """Python reads NaN and Infinity, which no other reader of our results would."""
    raise ValueError(f"{name} is not a number in JSON")


def text_lines(prompts: Iterable[bytes], is_chat: bool) -> Iterator[Line]:
    """Prompts, or first messages of chats, from arguments or from lines of standard input."""
    for number, raw in enumerate(prompts, start=1):
        try:
            prompt = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield Line(number, error=f"prompt {number} is not UTF-8: {error}")
            continue
        message = {"role": "user", "content": prompt}
        yield checked_line(number, {"messages": [message]} if is_chat else {"prompt": prompt})


def checked_line(number: int, record: dict[str, Any]) -> Line:
    """A line whose result can be written: of one that cannot, no more than its id is repeated."""
    fault = unwritable_part(record)
    if fault is not None:
        has_id = "id" in record and unwritable_part({"id": record["id"]}) is None
        return Line(number, {"id": record["id"]} if has_id else {}, f"line {number} {fault}")
    if ("prompt" in record) == ("messages" in record):
        return Line(number, record, f'line {number} needs either "prompt" or "messages"')
    return Line(number, record)


def unwritable_part(record: dict[str, Any]) -> str | None:
    """Why no reader would take a record if it were written again, or None."""
    if is_deep(record):
        return f"is nested more than {MAX_DEPTH} deep"
    try:
        encode_json(record)
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not text"
    except ValueError:
        return "holds a number that is not finite"
    return None


def is_deep(record: dict[str, Any]) -> bool:
    """Whether lists and objects are nested deeper than all that handles them can recurse."""
    level: list[Any] = [record]
    for _ in range(MAX_DEPTH):
        inner = (value.values() if isinstance(value, dict) else value for value in level)
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    return bool(level)


def encode_json(value: object) -> bytes:
    """JSON in one line of UTF-8. Raises ValueError, see `unwritable_part`."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")


def fingerprint(lines: Iterable[Line]) -> str:
    """A hash of all requests in their order. Bad lines are alike: they have no tokens."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(encode_json([line.number, line.record, line.error is None]) + b"\n")
    return digest.hexdigest()


def prepare(llm: LLM, line: Line, defaults: SamplingParams) -> tuple[list[int], SamplingParams]:
    """Token ids and parameters of a line that can be served; raises `InvalidRequestError`."""
    if line.error is not None:
        raise InvalidRequestError(line.error)
    try:
        params = line_params(line, defaults)
        if params.max_tokens is None and llm.engine.intake.sink_window is not None:
            raise InvalidRequestError("with --window a request needs max_tokens: it would not end")
        return llm.check(line_prompt(line), params), params
    except PagedKVError:
        raise
    except Exception as error:  # whatever a tokenizer raises, it costs this line and no other
        raise InvalidRequestError(f"{type(error).__name__}: {error}") from error


def line_params(line: Line, defaults: SamplingParams) -> SamplingParams:
    """The command line's sampling options, changed by those of the line."""
    changes = {k: v for k, v in line.record.items() if k in SAMPLING_FIELDS}
    unknown = set(line.record) - SAMPLING_FIELDS - set(ECHOED_FIELDS)
    if unknown:
        raise InvalidRequestError(f"unknown fields: {', '.join(map(repr, sorted(unknown)))}")
    for name, value in changes.items():
        if isinstance(value, bool) != (name == "ignore_eos"):
            expected = "true or false" if name == "ignore_eos" else "neither true nor false"
            raise InvalidRequestError(f"{name} must be {expected}, got {value!r}")
    if isinstance(changes.get("logit_bias"), dict):  # in JSON every key is text
        changes["logit_bias"] = {
            int(key) if key.isascii() and key.isdigit() else key: value
            for key, value in changes["logit_bias"].items()
        }
    form = changes.get("structured_output")
    if form is not None:
        known = {field.name for field in fields(StructuredOutput)}
        if not isinstance(form, dict) or set(form) - known:
            expected = f"an object with one of {', '.join(sorted(known))}"
            got = reprlib.repr(form)
            raise InvalidRequestError(f"structured_output must be {expected}, got {got}")
        changes["structured_output"] = StructuredOutput(**form)
    return replace(defaults, **changes)


def line_prompt(line: Line) -> Any:
    if "prompt" in line.record:
        prompt = line.record["prompt"]
        if isinstance(prompt, str) or is_list_of(prompt, is_integer):
            return prompt
        raise InvalidRequestError(f'"prompt" must be text or token ids, got {reprlib.repr(prompt)}')
    messages = line.record["messages"]
    if is_list_of(messages, is_message):
        return messages
    raise InvalidRequestError(
        f'"messages" must be a list of {{"role", "content"}}, got {reprlib.repr(messages)}'
    )


def is_message(value: object) -> bool:
    """Content may be parts, or null beside a tool call: whether they serve is the template's."""
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    return isinstance(value.get("content"), str | list | None)
