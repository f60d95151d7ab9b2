"""The application in a program of one's own, which brings nothing but an engine."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from paged_kv import LLM, AsyncLLM, ConfigError
from paged_kv.entrypoints.server.app import create_app
from paged_kv.entrypoints.server.observation import Observation
from paged_kv.entrypoints.server.settings import ServerSettings

SETTINGS = ServerSettings(model_name="demo")


async def statistics_after_a_request(llm: LLM) -> dict[str, object]:
    async with AsyncLLM(llm) as engine:
        transport = httpx.ASGITransport(create_app(engine, SETTINGS))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
            body = {"prompt": "The captain", "max_tokens": 3}
            assert (await client.post("/v1/completions", json=body)).status_code == 200
            assert "vllm:generation_tokens_total" in (await client.get("/metrics")).text
            return (await client.get("/statistics")).json()


def test_without_an_observer_it_counts_by_itself(llm: LLM) -> None:
    told = asyncio.run(statistics_after_a_request(llm))
    assert told["model"] == "demo"
    assert told["tokens"]["generated"] == 3


def test_an_engine_with_a_listener_needs_the_observer_that_it_tells(llm: LLM) -> None:
    async def make() -> None:
        observation = Observation(llm, "demo")
        async with AsyncLLM(llm, listener=observation) as engine:
            create_app(engine, SETTINGS, observation)
            with pytest.raises(ConfigError, match="has a listener"):
                create_app(engine, SETTINGS)

    asyncio.run(make())
