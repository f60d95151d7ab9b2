"""A sequence of an `LLM` that is fed and asked for more, for ever: nothing is computed twice.

Knows tokens and one windowed sequence in a pool of its own, never requests.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np

from ..blocks.geometry import IntArray
from ..blocks.sink_window import SinkWindow
from ..blocks.step_plan import StepPlan
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_groups import max_blocks
from ..cache.memory_stats import MemoryStats
from ..engine.live_request import LiveRequest, draw_of
from ..engine.model_runner import ModelRunner
from ..engine.output_processor import OutputProcessor
from ..engine.sampler import Sampling, sampling_arrays, uniform_numbers
from ..engine.sampling_params import SamplingParams
from ..engine.text import encode_prompt
from ..errors import ClosedError, ConfigError, InvalidRequestError
from ..scheduler.request import Request
from ..validation import require
from .outputs import Completion, OutputAssembler
from .text_engine import Output

if TYPE_CHECKING:
    from .llm import LLM

UNFIT: Final = ("sink_window", "adapter", "cache_salt", "prompt_logprobs", "best_of")


class Stream:
    """What `LLM.open_stream` gives: feed it with text or tokens, and ask it for more.

    It keeps attention sinks and a window of the newest tokens (`SinkWindow`) in blocks of its own,
    beside the pool of the LLM, whose weights it computes with; while it computes, requests of the
    LLM wait, and it waits for their steps. Close it before the LLM. For one thread at a time.
    """

    def __init__(self, llm: LLM, sink_window: SinkWindow | None = None) -> None:
        engine = llm.engine
        window = engine.intake.sink_window if sink_window is None else sink_window
        is_window = isinstance(window, SinkWindow)
        require("sink_window", window, is_window, "a SinkWindow, here or of the LLM")
        assert window is not None
        _ = engine.model.rotations  # or it raises
        self._llm, self._window = llm, window
        shared = engine.cache
        fitted = window.fitted(shared.geometry)
        most = max_blocks(list(shared.layers), shared.dtype, llm.max_model_len, fitted)
        # Of a step that stores a chunk before it lets go of what the window has passed.
        step = fitted.max_stored(shared.geometry) + shared.geometry.block_size
        room = shared.geometry.max_blocks(step) * len(shared.groups.retentions)
        cache = PagedKVCache(
            shared.layers, num_blocks=max(most, room), dtype=shared.dtype, device=shared.device
        )
        self._runner: ModelRunner | None = ModelRunner(engine.model, cache)
        self._manager: Final = cache.new_manager(max_num_seqs=1, max_model_len=llm.max_model_len)
        begins = [] if llm.tokenizer is None else llm.tokenizer.encode("")
        chain = self._manager.chain_tokens(begins, sink_window=window)
        self._seq_ids: IntArray = np.array([self._manager.add_sequence(chain)], dtype=np.int64)
        self._num_visible: Final = fitted.num_visible_tokens

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give its memory back. Can be called again."""
        self._runner = None

    @property
    def num_tokens(self) -> int:
        """Tokens so far, those that were let go and those that the tokenizer begins with too."""
        return int(self._manager.num_tokens[self._seq_ids[0]])

    def memory_stats(self) -> MemoryStats:
        """What its pool holds, and how large it is."""
        return self._open().cache.memory_stats(self._manager)

    def feed(self, text: str | Sequence[int]) -> None:
        """Text or token ids come next; they are computed when more is asked for.

        Raises `InvalidRequestError`, and feeds nothing, for what cannot be tokens of the model.
        """
        token_ids = self._encoded(text)
        wrong = [token for token in token_ids if not 0 <= token < self._llm.engine.model.vocab_size]
        if wrong:
            raise InvalidRequestError(f"token id {wrong[0]} is not in the model's vocabulary")
        self._append(token_ids)

    def generate(self, params: SamplingParams | None = None) -> Completion:
        """What the model says next, which is then a part of the stream.

        `max_tokens` has to be a number. Penalties count the tokens that are still seen. Raises
        `ConfigError` for options that a stream does not have.
        """
        runner, intake = self._open(), self._llm.engine.intake
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise ConfigError(f"params must be SamplingParams, got {params!r}")
        params = intake.completed(params)
        unfit = [name for name in UNFIT if getattr(params, name) is not None]
        if unfit or params.n > 1 or params.max_tokens is None:
            name = unfit[0] if unfit else "n" if params.n > 1 else "max_tokens"
            raise ConfigError(f"a stream does not take {name}={getattr(params, name)!r}")
        if not self.num_tokens:
            raise InvalidRequestError("a stream without tokens has to be fed before it says more")
        seen = self._manager.token_ids[self._seq_ids[0], : self.num_tokens][-self._num_visible :]
        request = Request("", seen.copy(), params.max_tokens)
        # The checks of a request; what is checked of its prompt was checked when it was fed.
        self._llm.check(seen[-1:].tolist(), replace(params, sink_window=self._window))
        processor = OutputProcessor(self._llm.tokenizer)
        live = LiveRequest(
            request=request,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            sample_index=0,
            end_token_ids=intake.end_token_ids(params),
            rules=intake.rules(request, params),
        )
        text = processor.follow(live, seen.tolist())
        assembler = OutputAssembler([""], [[]], [params])
        output = Output(text, lambda _: None, 0, 0)
        while not text.is_over:
            self._draw(runner, live)
            live.finish_reason = live.end
            text.catch_up()
            while (update := text.take()) is not None:
                assembler.add(output.event(update))
        return assembler.outputs[0].completions[0]

    def _draw(self, runner: ModelRunner, live: LiveRequest) -> None:
        """Compute what is known, and draw what comes next."""
        num_output = len(live.token_ids)
        draw = draw_of(live, 0, num_output)
        if not draw.params.is_greedy:
            draw.uniform = float(uniform_numbers([live.seed], [0], [num_output])[0])
        with self._llm.requests.at_rest():
            self._catch_up(runner)
            plan = self._reserve()
            try:
                logit_tokens = np.array([plan.num_tokens - 1])
                arrays = sampling_arrays([draw])
                logits, inputs = runner.run(plan, self._tokens_of(plan), logit_tokens, arrays)
                sampling = Sampling(logits, inputs, [draw])
                sampling.settle()
                if draw.error is not None:
                    raise draw.error
                self._manager.commit(plan)
            finally:
                self._let_go(plan)
        self._append([draw.token_id])
        live.take(draw)

    def _catch_up(self, runner: ModelRunner) -> None:
        """Compute all that is known but what fits into the last step."""
        while self._num_left > int(self._manager.num_computable(self._seq_ids)[0]):
            plan = self._reserve()
            try:
                runner.run(plan, self._tokens_of(plan), np.array([plan.num_tokens - 1]))
                self._manager.commit(plan)
            finally:
                self._let_go(plan)

    @property
    def _num_left(self) -> int:
        """Tokens that are known and not computed."""
        manager, seq_id = self._manager, self._seq_ids[0]
        num_computed = manager.num_computed_tokens[seq_id] + manager.num_evicted_tokens[seq_id]
        return int(manager.num_tokens[seq_id] - num_computed)

    def _reserve(self) -> StepPlan:
        plan = self._manager.reserve(self._seq_ids, self._manager.num_computable(self._seq_ids))
        assert plan is not None, "the pool has room for a step beyond the window"
        return plan

    def _tokens_of(self, plan: StepPlan) -> IntArray:
        known = self._manager.token_ids[self._seq_ids[0]]
        token_ids: IntArray = known[plan.positions].astype(np.int64)
        return token_ids

    def _let_go(self, plan: StepPlan) -> None:
        """A step that was cut off did not happen."""
        if not plan.is_over:
            self._manager.rollback(plan)

    def _encoded(self, text: str | Sequence[int]) -> list[int]:
        self._open()
        if isinstance(text, str) and self._llm.tokenizer is not None:
            encoded = self._llm.tokenizer.encode(text, add_special_tokens=False)
            return list(map(int, encoded))
        return encode_prompt(text, self._llm.tokenizer)

    def _append(self, token_ids: Sequence[int]) -> None:
        self._manager.append_tokens(self._seq_ids, token_ids, [len(token_ids)])

    def _open(self) -> ModelRunner:
        if self._runner is None:
            raise ClosedError("the stream is closed")
        return self._runner
