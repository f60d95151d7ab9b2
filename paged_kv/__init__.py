"""paged_kv: a paged-attention block manager whose KV blocks are quantized.

Names are imported when they are first used, so that the block manager needs no torch and the cache
no transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import (
    ConfigError,
    GenerationError,
    InvalidRequestError,
    InvalidStepError,
    MissingDependencyError,
    ModelNotFoundError,
    NonFiniteLogitsError,
    OutOfBlocksError,
    PagedKVError,
    PromptTooLongError,
    TransferError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from .attention import paged_attention as paged_attention
    from .beam_search import BeamSearchParams as BeamSearchParams
    from .block_manager import BlockManager as BlockManager
    from .blocks import BlockGeometry as BlockGeometry
    from .cache import LayerSpec as LayerSpec
    from .cache import MemoryStats as MemoryStats
    from .cache import PagedKVCache as PagedKVCache
    from .cache import cache_geometry as cache_geometry
    from .cache import num_blocks_for as num_blocks_for
    from .events import BlockRemoved as BlockRemoved
    from .events import BlockStored as BlockStored
    from .events import CacheCleared as CacheCleared
    from .formats import FORMATS as FORMATS
    from .formats import INT2 as INT2
    from .formats import INT4 as INT4
    from .formats import INT8 as INT8
    from .formats import NATIVE as NATIVE
    from .formats import KVFormat as KVFormat
    from .llm import LLM as LLM
    from .llm import Completion as Completion
    from .llm import RequestOutput as RequestOutput
    from .llm import StreamEvent as StreamEvent
    from .sampling import SamplingParams as SamplingParams
    from .scheduler.request import Request as Request
    from .scheduler.scheduler import BlockCopy as BlockCopy
    from .scheduler.scheduler import Fork as Fork
    from .scheduler.scheduler import ScheduledStep as ScheduledStep
    from .scheduler.scheduler import Scheduler as Scheduler
    from .scheduler.scheduler import SchedulerStatistics as SchedulerStatistics
    from .sink_window import SinkWindow as SinkWindow
    from .step_plan import StepPlan as StepPlan
    from .swap import SwappedSequence as SwappedSequence
    from .token_chain import TokenChain as TokenChain
    from .transfer import export_sequence as export_sequence
    from .transfer import import_sequence as import_sequence

_HOME = {
    "FORMATS": "formats",
    "INT2": "formats",
    "INT4": "formats",
    "INT8": "formats",
    "LLM": "llm",
    "NATIVE": "formats",
    "BeamSearchParams": "beam_search",
    "BlockCopy": "scheduler.scheduler",
    "BlockGeometry": "blocks",
    "BlockManager": "block_manager",
    "BlockRemoved": "events",
    "BlockStored": "events",
    "CacheCleared": "events",
    "Completion": "llm",
    "Fork": "scheduler.scheduler",
    "KVFormat": "formats",
    "LayerSpec": "cache",
    "MemoryStats": "cache",
    "PagedKVCache": "cache",
    "Request": "scheduler.request",
    "RequestOutput": "llm",
    "SamplingParams": "sampling",
    "ScheduledStep": "scheduler.scheduler",
    "Scheduler": "scheduler.scheduler",
    "SchedulerStatistics": "scheduler.scheduler",
    "SinkWindow": "sink_window",
    "StepPlan": "step_plan",
    "StreamEvent": "llm",
    "SwappedSequence": "swap",
    "TokenChain": "token_chain",
    "cache_geometry": "cache",
    "export_sequence": "transfer",
    "import_sequence": "transfer",
    "num_blocks_for": "cache",
    "paged_attention": "attention",
}
_EXTRA_PACKAGES = ("transformers", "tokenizers", "safetensors", "rich")

__all__ = [
    "ConfigError",
    "GenerationError",
    "InvalidRequestError",
    "InvalidStepError",
    "MissingDependencyError",
    "ModelNotFoundError",
    "NonFiniteLogitsError",
    "OutOfBlocksError",
    "PagedKVError",
    "PromptTooLongError",
    "TransferError",
    "UnsupportedModelError",
    *_HOME,
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_HOME[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA_PACKAGES:
            raise
        raise MissingDependencyError(
            f"paged_kv.{name} needs {error.name}: pip install 'paged-kv[models]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
