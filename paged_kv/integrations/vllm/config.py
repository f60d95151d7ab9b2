"""What a user asked vLLM for, and whether it can be had. Knows settings, never pages.

--additional-config '{"paged_kv": {"format": "int2", "key_clip": 1.0}}'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, NamedTuple

import vllm
from vllm.config import get_current_vllm_config_or_none

from ...cache.formats import KVFormat, resolve_format
from ...cache.layer_spec import LayerSpec
from ...errors import ConfigError
from ...validation import require

TESTED_VERSIONS: Final = ("0.32",)  # major and minor
FIELDS: Final = frozenset(field.name for field in fields(KVFormat)) - {"name"}


class Settings(NamedTuple):
    kv_format: KVFormat
    keeps_all: bool  # also what a layer's window has passed: vLLM's manager of groups is off


_seen: Settings | None = (
    None  # of this process: vLLM asks for specs outside of its config's context
)


def kv_format_of(config: Any) -> KVFormat:
    """The format of the options; raises `ConfigError` for what they do not name rightly."""
    given = config.additional_config
    meant = [name for name in given if name != "paged_kv" and is_meant_for_us(name)]
    if meant:
        raise ConfigError(
            f"--additional-config has {meant[0]!r}; paged_kv's options stand as "
            '{"paged_kv": {"format": ...}}'
        )
    options = given.get("paged_kv", {})
    is_options = isinstance(options, Mapping) and all(isinstance(name, str) for name in options)
    require("paged_kv", options, is_options, "a mapping of options in --additional-config")
    changes = dict(options)
    kv_format = resolve_format(changes.pop("format", "int8"))
    unknown = sorted(set(changes) - FIELDS)
    if unknown:
        raise ConfigError(
            f"paged_kv has no option {unknown[0]!r}; there are format, {', '.join(sorted(FIELDS))}"
        )
    return kv_format.with_options(**changes)


def is_meant_for_us(name: str) -> bool:
    return name.replace("-", "_").lower() in {"paged_kv", "pagedkv", "format", *FIELDS}


def require_supported(config: Any) -> None:
    """Raise `ConfigError`, naming the setting, for what these blocks are not made for."""
    version = vllm.__version__
    if not version.startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS)):
        raise ConfigError(
            f"paged_kv was tested with vLLM {', '.join(TESTED_VERSIONS)}, this is {version}"
        )
    parallel, cache_dtype = config.parallel_config, config.cache_config.cache_dtype
    is_context_parallel = (
        parallel.decode_context_parallel_size > 1
        or getattr(parallel, "prefill_context_parallel_size", 1) > 1
    )
    reasons = {
        f"--kv-cache-dtype {cache_dtype}: the format says what is stored": cache_dtype != "auto",
        "a KV connector (--kv-transfer-config, --kv-offloading-size) moves pages as if each were "
        "its tokens": config.kv_transfer_config,
        "speculative decoding (--speculative-config) takes tokens back that may be sealed": (
            config.speculative_config
        ),
        "context parallelism deals tokens out to pages": is_context_parallel,
        "MLA stores no keys and values": config.model_config and config.model_config.use_mla,
    }
    for reason, is_asked_for in reasons.items():
        if is_asked_for:
            raise ConfigError(f"paged_kv cannot be used: {reason}")


def current_settings() -> Settings:
    """Of the engine that is being made, or was made last in this process."""
    global _seen
    config = get_current_vllm_config_or_none()
    if config is not None:
        require_supported(config)
        keeps_all = bool(config.scheduler_config.disable_hybrid_kv_cache_manager)
        _seen = Settings(kv_format_of(config), keeps_all)
    assert _seen is not None, "vLLM asks for no spec before it has made a layer"
    return _seen


def layer_spec(num_kv_heads: int, key_dim: int, value_dim: int) -> LayerSpec:
    kv_format = current_settings().kv_format
    return LayerSpec(
        kv_format=kv_format, num_kv_heads=num_kv_heads, key_dim=key_dim, value_dim=value_dim
    )
