"""What a server says of itself: whether it lives and takes requests, versions and figures.

Knows an engine's figures, never requests.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from ...errors import ClosedError
from ..installed_version import version
from .served import Served

router = APIRouter()


@router.get("/health")
@router.api_route("/ping", methods=["GET", "POST"])
async def tell_health() -> dict[str, str]:
    return {"status": "alive"}


@router.get("/ready")
async def tell_readiness(request: Request) -> dict[str, str]:
    served: Served = request.app.state.served
    if not served.engine.is_accepting:
        raise ClosedError("no more requests are taken")
    return {"status": "ready"}


@router.get("/version")
async def tell_version() -> dict[str, str]:
    return {"version": version()}


@router.get("/statistics")
async def tell_statistics(request: Request) -> dict[str, Any]:
    served: Served = request.app.state.served
    return asdict(served.engine.llm.statistics())
