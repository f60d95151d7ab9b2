"""What a server says of itself: whether it lives and takes requests, versions and figures.

Knows an engine's figures, never requests.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST

from ...errors import ClosedError
from ...version import __version__
from .served import Served

router: Final = APIRouter()


@router.get("/health")
@router.api_route("/ping", methods=["GET", "POST"])
async def tell_health(request: Request) -> dict[str, str]:
    served: Served = request.app.state.served
    if served.engine.failure is not None:
        raise ClosedError(served.engine.failure)
    return {"status": "alive"}


@router.get("/ready")
async def tell_readiness(request: Request) -> dict[str, str]:
    served: Served = request.app.state.served
    if not served.engine.is_accepting:
        raise ClosedError(served.engine.failure or "no more requests are taken")
    return {"status": "ready"}


@router.get("/version")
async def tell_version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/statistics")
async def tell_statistics(request: Request) -> dict[str, Any]:
    served: Served = request.app.state.served
    return served.observer.statistics()


@router.get("/metrics")
async def tell_metrics(request: Request) -> Response:
    served: Served = request.app.state.served
    return Response(served.observer.exposition(), media_type=CONTENT_TYPE_LATEST)
