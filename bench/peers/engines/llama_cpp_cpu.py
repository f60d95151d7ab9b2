"""llama.cpp by its low-level API, all requests as sequences of one context, as its server has them.

A step is a token of each request that has its prompt behind it, then prompts in what room is left.
As with that server, requests keep their prompts in the cache from round to round where prefix
caching is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import llama_cpp as llama
import numpy as np
from job import Clock, Job, Round, serve

STEP_TOKENS = 1024  # in ubatches as large; of 512 they took 3 to 5 % longer
KV_TYPES = {"f16": (llama.GGML_TYPE_F16, 2), "q8_0": (llama.GGML_TYPE_Q8_0, 34 / 32)}  # bytes


@dataclass
class Request:
    prompt: list[int]
    num_new: int
    num_held: int  # in the cache, of the prompt and of the tokens after it
    tokens: list[int] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.tokens) == self.num_new

    @property
    def has_whole_prompt(self) -> bool:
        return self.num_held >= len(self.prompt)

    def next_piece(self, room: int) -> list[int]:
        """What comes into the next step, where `room` tokens are left."""
        if self.is_done:
            return []
        return self.tokens[-1:] if self.tokens else self.prompt[self.num_held :][:room]


class Engine:
    """A context with a sequence for each request.

    Each has a cache of its own, as is the default: one for all was slower, by 10 to 20 % in `short`
    and more in `mixed`. Flash attention was faster with either.
    """

    def __init__(self, job: Job) -> None:
        llama.llama_backend_init()
        kv_type, number_bytes = KV_TYPES[job.kv]
        path = f"{job.extra['gguf']}/{job.precision}.gguf"
        model: Any = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        settings = llama.llama_context_default_params()
        settings.n_seq_max = len(job.prompts)
        settings.n_ctx = len(job.prompts) * job.longest
        settings.n_batch = settings.n_ubatch = STEP_TOKENS
        settings.n_threads = settings.n_threads_batch = job.num_threads
        settings.type_k = settings.type_v = kv_type
        settings.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._context: Any = llama.llama_init_from_model(model, settings)
        self._memory = llama.llama_get_memory(self._context)
        self._batch = llama.llama_batch_init(STEP_TOKENS, 0, 1)
        self._num_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        head_dim = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
        num_heads = llama.llama_model_n_layer(model) * llama.llama_model_n_head_kv(model)
        self.token_bytes = 2 * num_heads * head_dim * number_bytes

    def admit(self, requests: list[Request]) -> None:
        """Keep what they hold; nothing else stays in the cache."""
        self._requests = requests
        for index, request in enumerate(requests):
            llama.llama_memory_seq_rm(self._memory, index, request.num_held, -1)

    def share_opening(self, num_tokens: int) -> None:
        """Decode what all prompts begin with once, and copy it to every sequence.

        llama.cpp finds no prefixes itself; its users can do this where they know of one.
        """
        first, *others = self._requests
        while first.num_held < num_tokens:
            self._decode({0: first.prompt[first.num_held : num_tokens][:STEP_TOKENS]})
        for index, request in enumerate(others, 1):
            llama.llama_memory_seq_cp(self._memory, 0, index, -1, -1)
            request.num_held = num_tokens

    def step(self) -> list[tuple[int, int]]:
        """Indices of requests, each with its new token."""
        pieces, room = {}, STEP_TOKENS
        for index in sorted(range(len(self._requests)), key=self._is_in_its_prompt):
            piece = self._requests[index].next_piece(room)
            if piece:
                pieces[index] = piece
                room -= len(piece)
        return self._decode(pieces)

    def _is_in_its_prompt(self, index: int) -> bool:
        return not self._requests[index].tokens

    def _decode(self, pieces: dict[int, list[int]]) -> list[tuple[int, int]]:
        batch, size, rows = self._batch, 0, {}
        for index, piece in pieces.items():
            request = self._requests[index]
            for token in piece:
                batch.token[size] = token
                batch.pos[size] = request.num_held
                batch.n_seq_id[size] = 1
                batch.seq_id[size][0] = index
                batch.logits[size] = False
                request.num_held += 1
                size += 1
            if request.has_whole_prompt:
                rows[index] = size - 1
                batch.logits[size - 1] = True
        batch.n_tokens = size
        if llama.llama_decode(self._context, batch):
            raise RuntimeError("llama.cpp did not decode a batch")
        return [(index, self._best_token(row)) for index, row in rows.items()]

    def _best_token(self, row: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._num_vocab,)).argmax())


def prepare(job: Job) -> Callable[[], Round]:
    engine = Engine(job)
    num_shared = length_of_opening(job.prompts) if job.has_prefix_cache else 0
    kept = [0] * len(job.prompts)

    def run() -> Round:
        clock, most = Clock(len(job.prompts)), 0
        requests = [
            Request(prompt, count, held)
            for prompt, count, held in zip(job.prompts, job.num_new, kept, strict=True)
        ]
        engine.admit(requests)
        if num_shared and not kept[0]:
            engine.share_opening(num_shared)
        while not all(request.is_done for request in requests):
            for index, token in engine.step():
                requests[index].tokens.append(token)
                clock.note(index, [token])
            most = max(most, sum(request.num_held for request in requests))
        if job.has_prefix_cache:
            kept[:] = [len(prompt) - 1 for prompt in job.prompts]
        return Round(clock.tokens, clock.times, int(most * engine.token_bytes))

    return run


def length_of_opening(prompts: list[list[int]]) -> int:
    """Tokens with which all prompts begin, and after which all go on."""
    shortest = min(map(len, prompts))
    differ = (i for i in range(shortest - 1) if len({prompt[i] for prompt in prompts}) > 1)
    return next(differ, shortest - 1)


if __name__ == "__main__":
    serve(prepare)
