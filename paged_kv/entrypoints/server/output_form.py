"""Forms that OpenAI's and vLLM's requests ask an answer to have. Knows how they are written, never
what an engine does for them.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, model_validator

from ...engine.structured_output import StructuredOutput
from ...errors import ConfigError
from .refusal import Refusal
from .strict_model import StrictModel

ANY_OBJECT: Final = {"type": "object"}


class SchemaFormat(StrictModel):
    """`strict` or not, an answer always follows its schema; the name and what it is for are not
    shown to the model.
    """

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            missing = "is missing" if self.json_schema is None else "needs type json_schema"
            name = "response_format.json_schema"
            raise Refusal(f"{name} {missing}", param=name)
        return self


class StructuredOutputs(StrictModel):
    """One of these, as vLLM calls them."""

    json_: Any = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    grammar: str | None = None
    choice: list[str] | None = None

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            name = "structured_outputs"
            raise Refusal(f"{name} must have exactly one of its fields", param=name)
        return self


def form_of(
    response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None
) -> StructuredOutput | None:
    if response_format is not None and response_format.type != "text":
        if structured_outputs is not None:
            raise Refusal(
                "give response_format or structured_outputs, not both", param="response_format"
            )
        wanted = response_format.json_schema
        return StructuredOutput(json_schema=ANY_OBJECT if wanted is None else wanted.schema_)
    if structured_outputs is None:
        return None
    if structured_outputs.json_object:
        return StructuredOutput(json_schema=ANY_OBJECT)
    try:
        return StructuredOutput(
            json_schema=structured_outputs.json_,
            regex=structured_outputs.regex,
            grammar=structured_outputs.grammar,
            choice=structured_outputs.choice,
        )
    except ConfigError as error:
        message = f"structured_outputs.{error}".replace(".json_schema ", ".json ", 1)
        raise Refusal(message, param=message.partition(" ")[0]) from error
