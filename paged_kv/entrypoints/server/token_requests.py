"""The bodies of `POST /tokenize` and `/detokenize`, as vLLM has them. Knows their fields."""

from __future__ import annotations

from pydantic import Field

from .chat_request import ChatFields
from .strict_model import StrictModel


class TokenizeText(StrictModel):
    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(ChatFields):
    model: str | None = None
    add_special_tokens: bool = False
    return_token_strs: bool = False


class DetokenizeRequest(StrictModel):
    tokens: list[int] = Field(max_length=1 << 20)
    model: str | None = None
