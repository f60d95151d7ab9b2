"""Where vLLM finds paged_kv: its entry points. Knows names, and imports nothing heavy.

    vllm serve MODEL --attention-backend CUSTOM --additional-config '{"paged_kv": {"format": "int2"}}'

vLLM keeps its scheduler, block pool, block tables, prefix cache and model runner; nothing of it is
patched. The plugin says how large a page is and when pages are given back (`spec`, `manager`), and
how a page is read and written (`backend`). vLLM walks the modules that are loaded when it starts
and trips over llvmlite: nothing here may import kernels.
"""  # noqa: E501

from __future__ import annotations


def register() -> None:
    """Of `vllm.general_plugins`: runs in every process of vLLM, possibly more than once."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    path = "paged_kv.integrations.vllm.backend.PagedKVBackend"
    register_backend(AttentionBackendEnum.CUSTOM, path)


def cpu_platform() -> str | None:
    """Of `vllm.platform_plugins`: vLLM's own CPU platform takes no backend but its own."""
    from vllm.platforms import cpu_platform_plugin

    is_cpu = cpu_platform_plugin() is not None
    return "paged_kv.integrations.vllm.platform.PagedKVCpuPlatform" if is_cpu else None
