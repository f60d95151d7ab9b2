"""The HTTP application over an engine. Knows how its parts go together, never what they do."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from ...errors import ConfigError
from ..async_llm import AsyncLLM
from . import chat_completions, completions, embeddings, models, state, tokens
from .api_key_guard import ApiKeyGuard
from .error_answers import handle_errors
from .observation import Observation
from .page_files import add_page, files_by_path
from .served import ModelOfLLM, Observer, Served
from .settings import ServerSettings


def create_app(
    engine: AsyncLLM, settings: ServerSettings, observer: Observer | None = None
) -> FastAPI:
    """An ASGI application; engine and observer stay their owner's, who closes them afterwards.

    Without an observer it makes one, which becomes the engine's listener; raises `ConfigError` for
    an engine that has another one.
    """
    if observer is None:
        if engine.listener is not None:
            raise ConfigError("the engine has a listener: give create_app the observer it tells")
        observer = engine.listener = Observation(engine.llm, settings.model_name)
    return app_of(Served(engine, settings, observer, ModelOfLLM(engine.llm)))


def app_of(served: Served) -> FastAPI:
    """An ASGI application over an engine that is one or speaks for several."""
    settings = served.settings
    app = FastAPI(title="paged-kv", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.served = served
    for part in (chat_completions, completions, embeddings, models, tokens, state):
        app.include_router(part.router)
    add_page(app)
    handle_errors(app)
    if settings.api_key is not None:
        app.add_middleware(
            ApiKeyGuard, api_key=settings.api_key, open_paths=frozenset(files_by_path())
        )
    if settings.allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app
