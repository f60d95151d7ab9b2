"""vLLM's CPU platform, but `--attention-backend CUSTOM` is honoured, and checked at once.

Knows names only.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum


class PagedKVCpuPlatform(CpuPlatform):  # type: ignore[misc]
    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        """Refuse what cannot be before a worker is started."""
        super().check_and_update_config(vllm_config)
        if vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM:
            from .config import kv_format_of, require_supported

            require_supported(vllm_config)
            kv_format_of(vllm_config)

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if selected_backend is AttentionBackendEnum.CUSTOM and not attn_selector_config.use_mla:
            return str(AttentionBackendEnum.CUSTOM.get_path())
        path = super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        return str(path)
