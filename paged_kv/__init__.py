"""paged_kv: a paged-attention block manager whose KV blocks are quantized.

Knows where public names live, never what they do. They are imported when they
are first used, so that the block manager needs no torch and the cache no transformers.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import (
    ClosedError,
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
    QueueFullError,
    RequestTimeoutError,
    TransferError,
    UnsupportedModelError,
)
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .blocks.block_manager import BlockManager as BlockManager
    from .blocks.block_tables import StoredLengths as StoredLengths
    from .blocks.events import BlockRemoved as BlockRemoved
    from .blocks.events import BlockStored as BlockStored
    from .blocks.events import CacheCleared as CacheCleared
    from .blocks.geometry import BlockGeometry as BlockGeometry
    from .blocks.host_blocks import SwappedSequence as SwappedSequence
    from .blocks.retention import Retention as Retention
    from .blocks.sink_window import SinkWindow as SinkWindow
    from .blocks.step_plan import StepPlan as StepPlan
    from .blocks.token_chain import TokenChain as TokenChain
    from .cache.attention import paged_attention as paged_attention
    from .cache.embedding import EmbeddedLayer as EmbeddedLayer
    from .cache.embedding import step_from_block_table as step_from_block_table
    from .cache.embedding import warm_up as warm_up
    from .cache.formats import FORMATS as FORMATS
    from .cache.formats import INT2 as INT2
    from .cache.formats import INT4 as INT4
    from .cache.formats import INT8 as INT8
    from .cache.formats import NATIVE as NATIVE
    from .cache.formats import KVFormat as KVFormat
    from .cache.kv_cache import PagedKVCache as PagedKVCache
    from .cache.layer_groups import num_blocks_for as num_blocks_for
    from .cache.layer_spec import LayerSpec as LayerSpec
    from .cache.layer_spec import cache_geometry as cache_geometry
    from .cache.memory_stats import MemoryStats as MemoryStats
    from .cache.transfer import export_sequence as export_sequence
    from .cache.transfer import import_sequence as import_sequence
    from .engine.beam_search import BeamSearchParams as BeamSearchParams
    from .engine.draft_model import DraftModel as DraftModel
    from .engine.handover import PrefilledPrompt as PrefilledPrompt
    from .engine.prompt_lookup import PromptLookup as PromptLookup
    from .engine.sampling_params import SamplingParams as SamplingParams
    from .engine.store_counts import BlockStoreStatistics as BlockStoreStatistics
    from .engine.structured_output import StructuredOutput as StructuredOutput
    from .engine.token_logprob import TokenLogprob as TokenLogprob
    from .entrypoints.async_llm import AsyncLLM as AsyncLLM
    from .entrypoints.async_request import AsyncRequest as AsyncRequest
    from .entrypoints.async_request import RequestTimes as RequestTimes
    from .entrypoints.llm import LLM as LLM
    from .entrypoints.outputs import Completion as Completion
    from .entrypoints.outputs import RequestOutput as RequestOutput
    from .entrypoints.outputs import StreamEvent as StreamEvent
    from .entrypoints.server.app import create_app as create_app
    from .entrypoints.server.settings import ServerSettings as ServerSettings
    from .entrypoints.stream import Stream as Stream
    from .integrations.transformers_cache import PagedCache as PagedCache
    from .kernels.new_tokens import NewTokens as NewTokens
    from .kernels.rules import ScoreRules as ScoreRules
    from .models.loading import DEMO_MODEL as DEMO_MODEL
    from .scheduler.request import Request as Request
    from .scheduler.scheduler import Scheduler as Scheduler
    from .scheduler.statistics import SchedulerStatistics as SchedulerStatistics
    from .scheduler.step import BlockCopy as BlockCopy
    from .scheduler.step import Fork as Fork
    from .scheduler.step import ScheduledStep as ScheduledStep
    from .stores.block_store import BlockStore as BlockStore
    from .stores.opening import open_store as open_store

_HOME = {
    "DEMO_MODEL": "models.loading",
    "FORMATS": "cache.formats",
    "INT2": "cache.formats",
    "INT4": "cache.formats",
    "INT8": "cache.formats",
    "LLM": "entrypoints.llm",
    "NATIVE": "cache.formats",
    "AsyncLLM": "entrypoints.async_llm",
    "AsyncRequest": "entrypoints.async_request",
    "BeamSearchParams": "engine.beam_search",
    "BlockCopy": "scheduler.step",
    "BlockGeometry": "blocks.geometry",
    "BlockManager": "blocks.block_manager",
    "BlockRemoved": "blocks.events",
    "BlockStore": "stores.block_store",
    "BlockStoreStatistics": "engine.store_counts",
    "BlockStored": "blocks.events",
    "CacheCleared": "blocks.events",
    "Completion": "entrypoints.outputs",
    "EmbeddedLayer": "cache.embedding",
    "DraftModel": "engine.draft_model",
    "Fork": "scheduler.step",
    "KVFormat": "cache.formats",
    "LayerSpec": "cache.layer_spec",
    "MemoryStats": "cache.memory_stats",
    "NewTokens": "kernels.new_tokens",
    "PagedCache": "integrations.transformers_cache",
    "PagedKVCache": "cache.kv_cache",
    "PrefilledPrompt": "engine.handover",
    "PromptLookup": "engine.prompt_lookup",
    "Request": "scheduler.request",
    "RequestOutput": "entrypoints.outputs",
    "RequestTimes": "entrypoints.async_request",
    "SamplingParams": "engine.sampling_params",
    "ScheduledStep": "scheduler.step",
    "Scheduler": "scheduler.scheduler",
    "SchedulerStatistics": "scheduler.statistics",
    "ScoreRules": "kernels.rules",
    "ServerSettings": "entrypoints.server.settings",
    "Retention": "blocks.retention",
    "SinkWindow": "blocks.sink_window",
    "StepPlan": "blocks.step_plan",
    "StoredLengths": "blocks.block_tables",
    "Stream": "entrypoints.stream",
    "StreamEvent": "entrypoints.outputs",
    "StructuredOutput": "engine.structured_output",
    "SwappedSequence": "blocks.host_blocks",
    "TokenChain": "blocks.token_chain",
    "TokenLogprob": "engine.token_logprob",
    "cache_geometry": "cache.layer_spec",
    "create_app": "entrypoints.server.app",
    "export_sequence": "cache.transfer",
    "import_sequence": "cache.transfer",
    "num_blocks_for": "cache.layer_groups",
    "open_store": "stores.opening",
    "paged_attention": "cache.attention",
    "step_from_block_table": "cache.embedding",
    "warm_up": "cache.embedding",
}
_EXTRA_OF_PACKAGE = {
    **dict.fromkeys(("transformers", "tokenizers", "safetensors", "rich"), "models"),
    **dict.fromkeys(("fastapi", "starlette", "prometheus_client"), "server"),
}

__all__ = [
    "ClosedError",
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
    "QueueFullError",
    "RequestTimeoutError",
    "TransferError",
    "UnsupportedModelError",
    *_HOME,
]

_HERE = Path(__file__).parent
# A checkout on Windows, a zip and a source distribution have no symbolic links: what should lead to
# these two folders is a small text file there, or nothing.
_LINKED_FOLDERS = ("kernels", "scheduler")


def _find_beside(folder: str) -> None:
    """Import `paged_kv.<folder>` from beside the package, as a package without an __init__.py.

    `__path__` stays as it is: with the checkout in it, `paged_kv.tests` could be imported too.
    Raises ImportError where the folder is not there either: an installation without it.
    """
    beside = _HERE.parent / folder
    is_checkout = (_HERE.parent / "pyproject.toml").is_file()
    if not (is_checkout and beside.is_dir()):
        raise ImportError(f"paged_kv is incomplete: neither {_HERE / folder} nor {beside} is there")
    spec = ModuleSpec(f"{__name__}.{folder}", None, is_package=True)
    spec.submodule_search_locations = [str(beside)]
    globals()[folder] = sys.modules[spec.name] = module_from_spec(spec)


for _folder in _LINKED_FOLDERS:
    if not (_HERE / _folder).is_dir():
        _find_beside(_folder)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_HOME[name]}", __name__)
    except ModuleNotFoundError as error:
        extra = _EXTRA_OF_PACKAGE.get(error.name or "")
        if extra is None:
            raise
        raise MissingDependencyError(
            f"paged_kv.{name} needs {error.name}: pip install 'paged-kv[{extra}]'"
        ) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
