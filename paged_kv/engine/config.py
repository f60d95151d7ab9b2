"""What an engine is asked for: the KV format, the pool and the limits of a step.

Knows values and their ranges, never the model that they are for.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..blocks.sink_window import SinkWindow
from ..cache.formats import KVFormat, resolve_format
from ..errors import ConfigError
from ..units import parse_memory
from ..validation import is_integer, require


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Validated when it is made; `LLM` documents what each field means."""

    kv_format: str | KVFormat = "int8"
    kv_memory: int | str | None = None
    num_blocks: int | None = None
    max_num_seqs: int = 64
    token_budget: int = 1024
    max_prefill_tokens: int | None = None
    max_model_len: int | None = None
    prefix_caching: bool = True
    swap_space: int | str = 0
    num_threads: int | None = None
    sink_window: SinkWindow | None = None

    def __post_init__(self) -> None:
        resolve_format(self.kv_format)
        window = self.sink_window
        is_window = window is None or isinstance(window, SinkWindow)
        require("sink_window", window, is_window, "a SinkWindow")
        if self.kv_memory is not None:
            parse_memory(self.kv_memory)
        if self.kv_memory is not None and self.num_blocks is not None:
            raise ConfigError(
                "give kv_memory or num_blocks, not both: "
                f"got {self.kv_memory!r} and {self.num_blocks}"
            )
        if self.swap_space != 0:
            parse_memory(self.swap_space)
        for name in (
            "num_blocks",
            "max_num_seqs",
            "token_budget",
            "max_prefill_tokens",
            "max_model_len",
            "num_threads",
        ):
            value = getattr(self, name)
            is_valid = value is None or (is_integer(value) and value >= 1)
            require(name, value, is_valid, "an integer of at least 1")
