"""The form that a request asks its output to have. Knows values, never what may come next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..validation import is_list_of, require


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """The form of a whole output, in one of these ways.

    A JSON schema (a mapping or its text; `{"type": "object"}` is any object), a regular expression,
    a context-free grammar (Lark's, or GBNF) or one of several texts. When it is complete, nothing
    follows but the model's end token. Forms are llguidance's (the extra `structured`).
    """

    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        given = [each.name for each in fields(self) if getattr(self, each.name) is not None]
        require("structured_output", given, len(given) == 1, "one of its fields")
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            require(name, value, value is None or (isinstance(value, str) and bool(value)), "text")
        is_texts = self.choice is None or is_list_of(
            self.choice, lambda text: isinstance(text, str)
        )
        is_texts = is_texts and (self.choice is None or len(self.choice) > 0)
        require("choice", self.choice, is_texts, "a list of texts")
        schema = self.json_schema
        require("json_schema", schema, schema is None or is_schema(schema), "a JSON schema")

    @property
    def form(self) -> tuple[str, str]:
        """The kind of grammar, as llguidance calls it, and its text."""
        if self.json_schema is not None:
            schema = self.json_schema
            return "json_schema", schema if isinstance(schema, str) else json.dumps(dict(schema))
        if self.regex is not None:
            return "regex", self.regex
        if self.grammar is not None:
            return "grammar", self.grammar
        assert self.choice is not None
        return "choice", json.dumps(list(self.choice))


def is_schema(value: object) -> bool:
    try:
        found = json.loads(value) if isinstance(value, str) else json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(found, dict)
