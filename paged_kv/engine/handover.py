"""A prompt that one process computes and another one goes on from.

Knows the bytes between the two, never who carries them. They are those of `export_sequence`: the
blocks of the prompt, its tokens, and the first token behind them, whose K/V are not there yet.
"""

from __future__ import annotations

from typing import Final

from ..blocks.block_manager import BlockManager
from ..cache.kv_cache import PagedKVCache
from ..cache.transfer import export_sequence, read_export, require_all_heads, tokens_of_export
from ..errors import InvalidRequestError, PagedKVError, TransferError, UnsupportedModelError
from ..models.attached_model import AttachedModel
from ..scheduler.request import BroughtBlocks, Request
from .sampling_params import SamplingParams

# What a request may not ask for: the data have the first token, and no more of how it was drawn.
NOT_HANDED_OVER: Final = ("logprobs", "prompt_logprobs", "best_of")


class PrefilledPrompt:
    """A prompt that was computed elsewhere, as the bytes that `LLM.prefill` returned there.

    Wherever a prompt is taken, this is one: the request goes on from its blocks, with the token
    that was drawn there as its first. `prompt_token_ids` are its tokens, `token_id` is that one.
    Raises `TransferError` for data that are corrupt, or no prompt with its first token; whether
    they fit the model, format and `cache_salt` is checked where they are used. They are not secret
    and not signed: take them only from where you would take the answer from.
    """

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        tokens, num_computed = tokens_of_export(data)
        if not 0 < num_computed == len(tokens) - 1:
            raise TransferError(
                f"the data have {num_computed} computed tokens and {len(tokens)} known ones; a "
                "prefilled prompt has one more known than computed, and not only that one"
            )
        self.data: Final = data if isinstance(data, bytes) else bytes(data)
        self.prompt_token_ids: Final[list[int]] = tokens[:-1].tolist()
        self.token_id: Final = int(tokens[-1])

    def __repr__(self) -> str:
        return f"PrefilledPrompt({len(self.prompt_token_ids)} tokens, {len(self.data)} bytes)"


class Departure:
    """A request that ends with its first token, to go on elsewhere with `data`."""

    def __init__(self) -> None:
        self.data: bytes | None = None

    def taken(self) -> bytes:
        """The data, once it is over; raises `PagedKVError` where somebody else has ended it."""
        if self.data is None:
            raise PagedKVError("the prompt was aborted before it was computed")
        return self.data


Handover = PrefilledPrompt | Departure


class HandoverDesk:
    """Sends prompts of one engine away, and takes those of others in."""

    def __init__(self, model: AttachedModel, cache: PagedKVCache, manager: BlockManager) -> None:
        self._model = model
        self._cache = cache
        self._manager = manager

    def check(self, params: SamplingParams, is_windowed: bool) -> None:
        """Raise `InvalidRequestError` for a request that cannot begin here and go on elsewhere,
        `TransferError` where each of several processes has some of the kv heads."""
        require_all_heads(self._cache)
        if self._model.keeps_states:
            raise UnsupportedModelError(
                "prompts are handed over as blocks, and the states of recurrent layers, which this "
                "model has, are in none"
            )
        if is_windowed:
            raise InvalidRequestError("a windowed request cannot be handed over")
        asked = {name: getattr(params, name) for name in NOT_HANDED_OVER}
        asked["n"] = params.n if params.n > 1 else None
        for name, value in asked.items():
            if value is not None:
                raise InvalidRequestError(
                    f"{name}={value} cannot be had of a prompt that is handed over: its data have "
                    "one first token, and not how likely it was"
                )

    def send(self, departure: Departure, seq_id: int) -> None:
        """The sequence has computed its prompt, and knows its first token."""
        departure.data = export_sequence(
            self._cache, self._manager, seq_id, model_fingerprint=self._model.fingerprint()
        )

    def take_in(self, prompt: PrefilledPrompt, request: Request) -> None:
        """Give a request, which nobody knows yet, what its prompt brings.

        Raises `TransferError` for what does not fit here.
        """
        read = read_export(
            self._cache,
            self._manager,
            prompt.data,
            self._model.fingerprint(),
            request.extra_keys,
            self._model.vocab_size,
        )
        request.bring([prompt.token_id], BroughtBlocks(read.lengths, read.records))
