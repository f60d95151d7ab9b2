"""What an engine is asked for: the KV format, the pool and the limits of a step.

Knows values and their ranges, never the model that they are for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from ..blocks.holdings import MAX_NUM_SEQS
from ..blocks.sink_window import SinkWindow
from ..cache.layer_formats import KVFormats, resolve_formats
from ..cache.layer_spec import FULL_PRECISION_DTYPES
from ..errors import ConfigError
from ..models.calibration import Calibration
from ..stores.block_store import BlockStore
from ..stores.opening import USUAL_SIZE
from ..units import parse_memory
from ..validation import MAX_COUNT, is_finite, is_flag, is_integer, require
from .draft_model import DraftModel
from .prompt_lookup import PromptLookup

MOST: Final = {
    "num_blocks": MAX_COUNT,
    "max_num_seqs": MAX_NUM_SEQS,
    "token_budget": MAX_COUNT,
    "max_prefill_tokens": MAX_COUNT,
    "max_model_len": MAX_COUNT,
    "num_threads": 4096,
    "tensor_parallel_size": 256,
}
MODELS_OWN: Final = "auto"  # generation_config: what came with the model
USUAL: Final = "usual"  # calibration: that on the library's own text
OPTIONAL: Final = ("num_blocks", "max_prefill_tokens", "max_model_len", "num_threads")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Validated when it is made; `LLM` documents what each field means."""

    kv_format: KVFormats = "int8"
    kv_dtype: torch.dtype | None = None
    calibration: Calibration | str | Path | None = USUAL
    kv_memory: int | str | None = None
    num_blocks: int | None = None
    max_num_seqs: int = 64
    token_budget: int = 1024
    max_prefill_tokens: int | None = None
    max_slowdown: float | None = None
    max_model_len: int | None = None
    prefix_caching: bool = True
    record_events: bool = False
    block_store: BlockStore | str | os.PathLike[str] | None = None
    block_store_size: int | str = USUAL_SIZE
    swap_space: int | str = 0
    num_threads: int | None = None
    enforce_eager: bool = False
    sink_window: SinkWindow | None = None
    generation_config: str | None = MODELS_OWN
    speculation: PromptLookup | DraftModel | None = None
    tensor_parallel_size: int = 1

    def __post_init__(self) -> None:
        resolve_formats(self.kv_format)
        dtype, calibration = self.kv_dtype, self.calibration
        is_dtype = dtype is None or dtype in FULL_PRECISION_DTYPES
        require("kv_dtype", dtype, is_dtype, "float32, bfloat16 or float16")
        is_known = calibration is None or isinstance(calibration, (Calibration, str, Path))
        require("calibration", calibration, is_known, 'a Calibration, its file, "usual" or None')
        window = self.sink_window
        is_window = window is None or isinstance(window, SinkWindow)
        require("sink_window", window, is_window, "a SinkWindow")
        guesses = self.speculation
        is_source = guesses is None or isinstance(guesses, (PromptLookup, DraftModel))
        require("speculation", guesses, is_source, "a PromptLookup, a DraftModel or None")
        if self.block_store is not None and self.tensor_parallel_size != 1:
            raise ConfigError(
                "block_store: a store takes blocks of all kv heads, and with tensor_parallel_size "
                f"{self.tensor_parallel_size} each process has its part of them"
            )
        if isinstance(guesses, DraftModel) and self.tensor_parallel_size != 1:
            raise ConfigError(
                "speculation: a DraftModel guesses in one process, not beside "
                f"tensor_parallel_size {self.tensor_parallel_size}; a PromptLookup does"
            )
        slowdown = self.max_slowdown
        is_ratio = slowdown is None or (is_finite(slowdown) and slowdown > 1)
        require("max_slowdown", slowdown, is_ratio, "None or a number above 1")
        own = self.generation_config
        require("generation_config", own, own in (None, MODELS_OWN), '"auto" or None')
        if self.kv_memory is not None:
            parse_memory(self.kv_memory, "kv_memory")
        if self.kv_memory is not None and self.num_blocks is not None:
            raise ConfigError(
                "give kv_memory or num_blocks, not both: "
                f"got {self.kv_memory!r} and {self.num_blocks}"
            )
        parse_memory(self.swap_space, "swap_space", least=0)
        self._check_store()
        for name in ("prefix_caching", "record_events", "enforce_eager"):
            require(name, getattr(self, name), is_flag(getattr(self, name)), "True or False")
        for name, most in MOST.items():
            value = getattr(self, name)
            is_valid = value is None and name in OPTIONAL
            is_valid = is_valid or (is_integer(value) and 1 <= value <= most)
            require(name, value, is_valid, f"an integer of at least 1 and at most {most}")

    def _check_store(self) -> None:
        store = self.block_store
        is_store = store is None or isinstance(store, (str, os.PathLike, BlockStore))
        require("block_store", store, is_store, "a folder, a url, a BlockStore or None")
        parse_memory(self.block_store_size, "block_store_size")
        if store is not None and not self.prefix_caching:
            raise ConfigError(f"a block_store needs prefix_caching, got {self.prefix_caching!r}")
