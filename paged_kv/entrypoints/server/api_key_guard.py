"""Who may ask. Knows a key and paths, never what is asked."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .error_answers import error_answer
from .refusal import Refusal

# What tells nothing of a model or of what others ask; all else needs the key, also what there is
# not.
STATE_PATHS: Final = frozenset({"/health", "/ready", "/ping", "/version"})


class ApiKeyGuard:
    """An ASGI application behind a key, `Authorization: Bearer KEY`, but for `open_paths`."""

    def __init__(self, app: ASGIApp, api_key: str, open_paths: frozenset[str]) -> None:
        self._app = app
        self._open_paths = STATE_PATHS | open_paths
        self._digest = sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in self._open_paths
        if is_open or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        refusal = Refusal("a valid API key is needed", 401, code="invalid_api_key")
        found = error_answer(refusal)
        await JSONResponse(found.body, found.status, found.headers)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        """Takes as long for a key that is right up to its last letter as for any other."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        is_equal = hmac.compare_digest(sha256(key.strip()).digest(), self._digest)
        return is_equal and scheme.lower() == b"bearer"
