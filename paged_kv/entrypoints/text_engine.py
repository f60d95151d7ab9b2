"""Requests whose tokens are read as text, for whoever waits for them.

Knows an engine and texts, never prompts as users give them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock, get_ident
from typing import Final, NamedTuple

from ..engine.engine import Engine
from ..engine.handover import Handover
from ..engine.live_request import GivenTokens
from ..engine.output_processor import OutputProcessor, TextOutput, TextUpdate
from ..engine.sampling_params import SamplingParams
from .outputs import StreamEvent

MAX_WAITING: Final = 256  # updates of a request that nobody takes, before it is paused
WAITING_SECONDS: Final = 1e-4


class Output(NamedTuple):
    """Where the text of a request belongs: who is told that it has more, prompt and sample."""

    text: TextOutput
    tell: Callable[[Output], None]
    prompt_index: int
    sample_index: int

    def event(self, update: TextUpdate) -> StreamEvent:
        return StreamEvent(
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            token_id=update.token_id,
            text=update.text,
            finish_reason=update.finish_reason,
            log_probability=update.log_probability,
            likeliest=update.likeliest,
            prompt_logprobs=update.prompt_logprobs,
            error=update.error,
        )


class TextEngine:
    """One engine for several threads, whose requests are decoded together.

    Each waits while another one steps, and finds what that step did for its own.
    """

    def __init__(self, engine: Engine, processor: OutputProcessor) -> None:
        self.engine = engine
        self.processor: Final = processor
        self._request_numbers = itertools.count()
        self._outputs: dict[str, Output] = {}  # of requests that somebody waits for
        self._lock = RLock()  # held by the thread that steps the engine
        self._waiting: set[int] = set()  # threads that want to
        self._is_behind = False  # an exception kept outputs from what the engine has for them

    def __len__(self) -> int:
        """Requests that somebody waits for."""
        return len(self._outputs)

    def new_ids(self, count: int) -> list[str]:
        return [str(next(self._request_numbers)) for _ in range(count)]

    def add(
        self,
        request_ids: Sequence[str],
        token_ids: list[int],
        params: SamplingParams,
        tell: Callable[[Output], None],
        *,
        priority: int = 0,
        prompt_index: int = 0,
        given: GivenTokens | None = None,
        handover: Handover | None = None,
    ) -> list[Output]:
        """Queue a request of one id for each sample; `tell` is called whenever one has more text.

        Raises as `Engine.add_request` does, and queues nothing then.
        """
        lives = self.engine.add_request(
            request_ids, token_ids, params, priority=priority, given=given, handover=handover
        )
        outputs = []
        for live in lives:
            text = self.processor.follow(live, token_ids, goes_on=given is not None)
            outputs.append(Output(text, tell, prompt_index, live.sample_index))
            self._outputs[live.request_id] = outputs[-1]
        return outputs

    def let_go(self, request_ids: Collection[str]) -> None:
        """Nobody waits for these any more; those that are not over end."""
        for request_id in request_ids:
            self._outputs.pop(request_id, None)
        self.engine.abort_all(request_ids)

    def forget(self, request_id: str) -> bool:
        """Nobody waits for a request that is over; whether somebody did."""
        return self._outputs.pop(request_id, None) is not None

    def step(
        self, is_ready: Callable[[], object] | None = None, *, keep_going: bool = False
    ) -> bool:
        """Step the engine, unless something `is_ready` after another thread's step; whether it did
        anything.

        What it did is told to those who wait for it, in whatever thread. With `keep_going` an
        exception ends the requests of that step, and is raised where it is not known which.
        """
        self._waiting.add(get_ident())
        did_anything = True
        with self._lock:
            self._waiting.discard(get_ident())
            if is_ready is None or not is_ready():
                did_anything = self._step(keep_going)
        if self._waiting:
            time.sleep(WAITING_SECONDS)  # or this thread would take the lock again before they can
        return did_anything

    def _step(self, keep_going: bool) -> bool:
        everybody, self._is_behind = self._is_behind, True
        num_steps = self.engine.num_steps
        try:
            names = [update.request_id for update in self.engine.step()]
        except Exception as error:
            if not keep_going or not self.engine.fail_step(error):
                raise
            names = []
        names += self.engine.take_ended()
        everybody |= not names
        for name in list(self._outputs) if everybody else names:
            output = self._outputs.get(name)
            if output is not None:  # or nobody waits for it since the middle of the step
                self._read(output)
        self._is_behind = False
        did_anything = bool(names) or self.engine.num_steps > num_steps
        return did_anything or self.engine.tier.holds_requests  # it may, in a moment

    def _read(self, output: Output) -> None:
        """Tell of what has come for an output; one whose updates nobody takes waits."""
        text = output.text
        text.catch_up()
        if text.is_stopped:
            self.engine.abort(text.live.request_id)
        elif text.num_waiting >= MAX_WAITING and not text.is_paused:
            text.is_paused = True
            self.engine.pause(text.live.request_id)
        output.tell(output)

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Nobody steps the engine meanwhile: for what reads what a step changes."""
        with self._lock:
            yield

    def resume(self, text: TextOutput) -> None:
        """Let a request go on of whose updates most were taken."""
        with self._lock:
            if text.num_waiting <= MAX_WAITING // 2:
                self.engine.resume(text.live.request_id)
                text.is_paused = False
