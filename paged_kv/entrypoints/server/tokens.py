"""`POST /tokenize` and `/detokenize`, as vLLM has them. Knows a tokenizer, never a model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Request
from transformers import PreTrainedTokenizerBase

from ...engine.text import encode_chat, encode_text
from .json_body import body_as, limited_body, parsed, require_json
from .refusal import Refusal
from .served import Served
from .token_requests import DetokenizeRequest, TokenizeChat, TokenizeText

router: Final = APIRouter()


async def tokenize_body(request: Request) -> TokenizeText | TokenizeChat:
    """Text has a `prompt`, a chat has `messages`."""
    require_json(request)
    content = await limited_body(request, request.app.state.served.settings.max_body)
    if b'"messages"' in content:
        return parsed(TokenizeChat, content)
    return parsed(TokenizeText, content)


@router.post("/tokenize")
async def tokenize(
    body: Annotated[TokenizeText | TokenizeChat, Depends(tokenize_body)], request: Request
) -> dict[str, Any]:
    served: Served = request.app.state.served
    served.check_name(body.model)
    tokenizer = tokenizer_of(served)
    if isinstance(body, TokenizeChat):
        token_ids = await asyncio.to_thread(
            encode_chat,
            body.plain_messages,
            tokenizer,
            None,
            add_special_tokens=body.add_special_tokens,
            **body.template_options,
        )
    else:
        token_ids = await asyncio.to_thread(
            encode_text, body.prompt, tokenizer, None, add_special_tokens=body.add_special_tokens
        )
    words = tokenizer.convert_ids_to_tokens(token_ids) if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": served.model.max_model_len,
        "tokens": token_ids,
        "token_strs": words,
    }


@router.post("/detokenize")
async def detokenize(
    body: Annotated[DetokenizeRequest, Depends(body_as(DetokenizeRequest))], request: Request
) -> dict[str, str]:
    served: Served = request.app.state.served
    served.check_name(body.model)
    tokenizer = tokenizer_of(served)
    require_tokens(body.tokens, len(tokenizer))
    return {"prompt": str(await asyncio.to_thread(tokenizer.decode, body.tokens))}


def tokenizer_of(served: Served) -> PreTrainedTokenizerBase:
    tokenizer = served.model.tokenizer
    if tokenizer is None:
        raise Refusal("the model has no tokenizer", code="unsupported")
    return tokenizer


def require_tokens(token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise Refusal(
                f"tokens: {token_id} is outside the vocabulary of {vocab_size}", param="tokens"
            )
