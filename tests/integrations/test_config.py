"""What vLLM is asked for: options of ours, and settings that these blocks are not made for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import vllm

from paged_kv.errors import ConfigError
from paged_kv.integrations.vllm.config import kv_format_of, require_supported
from tests.support.vllm_job import vllm_answer


def settings(**changes: Any) -> SimpleNamespace:
    parallel = {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    parallel |= {name: changes.pop(name) for name in parallel if name in changes}
    cache, model = changes.pop("cache_dtype", "auto"), changes.pop("use_mla", False)
    return SimpleNamespace(
        **{
            "additional_config": {},
            "kv_transfer_config": None,
            "speculative_config": None,
            "parallel_config": SimpleNamespace(**parallel),
            "cache_config": SimpleNamespace(cache_dtype=cache),
            "model_config": SimpleNamespace(use_mla=model),
            **changes,
        }
    )


def test_options_are_a_format_and_its_fields():
    options = {"format": "int2", "key_clip": 0.9, "num_sink_tokens": 16}
    kv_format = kv_format_of(settings(additional_config={"paged_kv": options, "other": 1}))
    assert (kv_format.key_bits, kv_format.key_clip, kv_format.num_sink_tokens) == (2, 0.9, 16)
    assert kv_format_of(settings()).name == "int8"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"paged_kv": {"format": "int5"}}, "unknown KV format 'int5'"),
        ({"paged_kv": {"keyclip": 1}}, "no option 'keyclip'; there are format, block_size, .*clip"),
        ({"paged_kv": {"key_clip": "big"}}, "key_clip.*'big'"),
        ({"paged_kv": "int2"}, "paged_kv.*'int2'"),
        ({"paged-kv": {"format": "int2"}}, "'paged-kv'"),
        ({"format": "int2"}, "'format'"),
        ({"key_clip": 1.0}, "'key_clip'"),
    ],
)
def test_options_that_are_not_named_rightly_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        kv_format_of(settings(additional_config=given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"kv_transfer_config": object()}, "--kv-offloading-size"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"decode_context_parallel_size": 2}, "context parallelism"),
        ({"prefill_context_parallel_size": 2}, "context parallelism"),
        ({"use_mla": True}, "MLA"),
    ],
)
def test_what_is_not_supported_is_refused_by_the_name_of_its_setting(changes, message):
    require_supported(settings())
    with pytest.raises(ConfigError, match=message):
        require_supported(settings(**changes))


def test_versions_that_were_not_tested_are_refused(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.raises(ConfigError, match=r"tested with vLLM 0\.32, this is 0\.99\.0"):
        require_supported(settings())


def test_an_engine_refuses_before_it_has_loaded_a_model():
    with pytest.raises(AssertionError, match="unknown KV format 'int5'") as refused:
        vllm_answer([[5]], kv_format="int8", paged_kv={"format": "int5"})
    assert "Loading safetensors" not in str(refused.value)
