"""`POST /v1/embeddings`, which there is none of. Knows why."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter
from fastapi.responses import Response

from .refusal import Refusal

router: Final = APIRouter()


@router.post("/v1/embeddings")
async def create_embedding() -> Response:
    """A model that generates has no vectors of texts that would be comparable: a list of its hidden
    states would look like an answer and be none.
    """
    raise Refusal("the model generates text: it has no embeddings", code="unsupported")
