"""Put together whoever guesses tokens for an engine. Knows settings and models, never requests."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ..blocks.block_manager import BlockManager
from ..cache.device_memory import usual_kv_memory
from ..cache.formats import NATIVE
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_groups import num_blocks_for
from ..cache.layer_spec import cache_geometry, keeping_all, usual_kv_dtype
from ..errors import ConfigError
from ..models.attached_model import AttachedModel
from ..models.huggingface import PagedModel
from ..models.length_limit import model_length
from ..models.loading import NEWEST, move_model
from ..models.widening import computes_wide
from .config import EngineConfig
from .draft_model import DraftModel, DraftRunner
from .model_runner import ModelRunner
from .speculation import Speculation


def find_speculation(
    config: EngineConfig,
    model: AttachedModel,
    manager: BlockManager,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Speculation | None:
    """What an engine asks for guesses; None where it asks for none.

    Raises `ConfigError` for a draft model that cannot guess for this one.
    """
    wanted = config.speculation
    if wanted is None:
        return None
    if model.keeps_states:
        name = type(model.model).__name__
        raise ConfigError(f"speculation: {name} has recurrent layers, which take no token back")
    limits = wanted.num_tokens, wanted.max_step_tokens
    if not isinstance(wanted, DraftModel):
        return Speculation(wanted, *limits)
    drafting = load_draft_model(wanted, model, tokenizer)
    try:
        drafting.check_batch(config.token_budget)
        runner = new_runner(drafting, manager)
        source = DraftRunner(*runner, token_budget=config.token_budget, vocab_size=model.vocab_size)
    except BaseException:
        drafting.close()
        raise
    return Speculation(source, *limits)


def load_draft_model(
    wanted: DraftModel, model: AttachedModel, tokenizer: PreTrainedTokenizerBase | None
) -> PagedModel:
    """The smaller model on the device of the other one."""
    found, own = NEWEST.load(wanted.model, None, None)
    if own is not None and tokenizer is not None and own.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"the draft model {str(wanted.model)!r} has another vocabulary")
    move_model(found, model.device)
    return PagedModel(found, widens=computes_wide(found, model.device))


def new_runner(drafting: PagedModel, manager: BlockManager) -> tuple[ModelRunner, BlockManager]:
    """The model on a pool for as many tokens as the manager's holds, and who hands that out."""
    layers = keeping_all(drafting.layers(NATIVE))  # what turns out wrong is taken back
    dtype, device = usual_kv_dtype(layers, drafting.dtype), drafting.device
    geometry = cache_geometry(layers, dtype)
    max_model_len = model_length(drafting.model, None)
    num_tokens = manager.num_blocks * manager.geometry.block_size
    num_blocks = min(
        -(-num_tokens // geometry.block_size),
        manager.max_num_seqs * geometry.max_blocks(max_model_len),
        num_blocks_for(usual_kv_memory(device), layers, dtype),
    )
    cache = PagedKVCache(layers, num_blocks=num_blocks, dtype=dtype, device=device)
    own_manager = cache.new_manager(
        max_num_seqs=manager.max_num_seqs,
        max_model_len=max_model_len,
        prefix_caching=False,
        model_fingerprint=drafting.fingerprint(),
    )
    return ModelRunner(drafting, cache), own_manager
