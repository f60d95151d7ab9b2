"""Ray Serve LLM, vLLM and our plugin: answers in our format, behind a router of prefixes."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app
from transformers import AutoTokenizer

from tests.support.vllm_job import MODEL, own_rounds

PROMPT = "Once upon a time there was a girl who"


def config() -> LLMConfig:
    return LLMConfig(
        model_loading_config={"model_id": "demo", "model_source": MODEL},
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        engine_kwargs={
            "attention_backend": "CUSTOM",
            "additional_config": {"paged_kv": {"format": "int2"}},
            "dtype": "float32",
            "max_model_len": 1024,
            "kv_cache_memory_bytes": 64 << 20,
            "enforce_eager": True,
            "tensor_parallel_size": 2,
        },
        deployment_config={
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": 2,
                "target_ongoing_requests": 32,
            },
            "request_router_config": {
                "request_router_class": "ray.serve.llm.request_router.PrefixCacheAffinityRouter"
            },
        },
        log_engine_metrics=False,
    )


@pytest.fixture(scope="module")
def url(cluster: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    one = {"num_replicas": 1, "autoscaling_config": None, "ray_actor_options": {"num_cpus": 0}}
    try:
        app = build_openai_app({"llm_configs": [config()], "ingress_deployment_config": one})
        serve.run(app, name="llm")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        serve.shutdown()


def ask(url: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/completions",
        json.dumps({"model": "demo", "prompt": PROMPT, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.loads(answer.read())


def test_an_answer_is_that_of_our_own_engine(url):
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    expected = own_rounds([tokenizer(PROMPT)["input_ids"]], "int2")[0][0]
    answer = ask(url, max_tokens=64, temperature=0, ignore_eos=True)
    assert answer["choices"][0]["text"] == tokenizer.decode(expected)


def test_the_log_says_the_format(url, cluster):
    said = "paged_kv: format int2, 42.0 bytes a token and layer (512 in vLLM's own cache)"
    logs = [path.read_text(errors="replace") for path in cluster.glob("worker-*")]
    assert any(said in log for log in logs)


def test_the_router_has_seen_the_prompt(url):
    ask(url, max_tokens=1)
    tree = ray.get_actor("LlmPrefixTreeActor", namespace="serve::llm::LLMServer:demo")
    (found, replicas) = ray.get(tree.prefix_match.remote(PROMPT + " and more"))
    assert (found, len(replicas)) == (PROMPT, 1)
