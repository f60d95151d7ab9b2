"""`GET /v1/models`: what may be asked for. Knows names, never what they do."""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request

from .served import Served

router: Final = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    served: Served = request.app.state.served
    return {"object": "list", "data": [card(served, name) for name in served.names]}


@router.get("/v1/models/{name:path}")
async def retrieve_model(name: str, request: Request) -> dict[str, Any]:
    served: Served = request.app.state.served
    return card(served, served.check_name(name))


def card(served: Served, name: str) -> dict[str, Any]:
    """A model, or an adapter of it, whose `parent` it is."""
    own = served.settings.model_name
    return {
        "id": name,
        "object": "model",
        "created": served.created,
        "owned_by": "paged_kv",
        "root": own,
        "parent": None if name == own else own,
        "max_model_len": served.model.max_model_len,
    }
