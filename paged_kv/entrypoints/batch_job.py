"""Serves the requests of a job, and hands on each result when it is finished.

Knows lines, an LLM and a sink of results; never files or arguments.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, cast

from ..engine.sampling_params import SamplingParams
from ..errors import PagedKVError
from .request_lines import Line, prepare
from .result_file import Result, ResultSink

if TYPE_CHECKING:
    from ..engine.token_logprob import TokenLogprob
    from .llm import LLM
    from .outputs import Completion, RequestOutput, StreamEvent

MAX_ERROR_CHARACTERS: Final = 500  # errors quote what they refuse, which may be a book
LEAST_LOGPROB: Final = -9999.0  # JSON knows no infinity
STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether SIGINT or SIGTERM asked for an end; within `with`. A second one ends at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for stop_signal in STOP_SIGNALS:
                if signal.getsignal(stop_signal) is not signal.SIG_IGN:  # as a shell's & may ask
                    self._before[stop_signal] = signal.signal(stop_signal, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        for stop_signal, handler in self._before.items():
            signal.signal(stop_signal, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for stop_signal in self._before:
            signal.signal(stop_signal, signal.SIG_DFL)


class BatchJob:
    """One run over the lines of a job; `run` gives the exit code.

    A line that is wrong, and a request that fails while it runs, has an error for its result and
    disturbs no other. Asked to stop, the job drops the requests that are not finished: resumed, it
    computes them from their beginning. In float32 and the native format they have, under a seed,
    the tokens they would have had; in others a request depends a little on its company.
    """

    def __init__(self, lines: Sequence[Line], defaults: SamplingParams, sink: ResultSink) -> None:
        self._lines = lines
        self._defaults = defaults
        self._sink = sink
        self._num_done = sum(sink.is_done(index) for index in range(len(lines)))
        self._num_failed = 0

    def run(self, llm: LLM) -> int:
        """0, or 1 if requests failed, or 128 + the signal that ended it before its end."""
        try:
            with StopRequest() as stop:
                self._serve(llm, stop)
                if self._num_done == len(self._lines):
                    self._sink.finish()
                    return 1 if self._num_failed else 0
        except (PagedKVError, RuntimeError, MemoryError) as error:
            kind = "" if isinstance(error, PagedKVError) else f"{type(error).__name__}: "
            raise PagedKVError(f"{kind}{error}; {self._progress}") from error
        assert stop.signal is not None
        warn(f"stopped by {stop.signal.name}: {self._progress}")
        return 128 + stop.signal

    @property
    def _progress(self) -> str:
        return f"{self._num_done} of {len(self._lines)} done; {self._sink.advice}"

    def _serve(self, llm: LLM, stop: StopRequest) -> None:
        from .outputs import OutputAssembler
        from .progress import Progress

        served, prompts, params = self._prepare(llm, stop)
        if not served or stop.signal:
            return
        assembler = OutputAssembler(prompts, prompts, params)
        total = sum(p.num_samples for p in params)
        stream = llm.stream(prompts, params, keep_going=True)
        events = cast("Generator[StreamEvent, None, None]", stream)
        with closing(events), Progress(total, llm.engine, None) as progress:
            for event in events:
                output = assembler.add(event)
                progress.update(is_finished=event.finish_reason is not None)
                if output is not None:
                    self._add(served[event.prompt_index], result_body(output))
                if stop.signal:
                    return

    def _prepare(
        self, llm: LLM, stop: StopRequest
    ) -> tuple[list[int], list[list[int]], list[SamplingParams]]:
        """Indices, token ids and parameters of lines to serve. Bad lines get their result."""
        served, prompts, params = [], [], []
        for index, line in enumerate(self._lines):
            if stop.signal:
                break
            if self._sink.is_done(index):
                continue
            try:
                token_ids, one = prepare(llm, line, self._defaults)
            except PagedKVError as error:
                self._add(index, {"error": str(error)})
                continue
            served.append(index)
            prompts.append(token_ids)
            params.append(one)
        return served, prompts, params

    def _add(self, index: int, body: Result) -> None:
        line = self._lines[index]
        if "error" in body:
            body = {"error": body["error"][:MAX_ERROR_CHARACTERS]}
        self._sink.add(index, {**line.echo, **body})
        self._num_done += 1
        if "error" in body:
            self._num_failed += 1
            warn(f"{line.name}: {body['error']}")


def result_body(output: RequestOutput) -> Result:
    errors = [str(c.error) for c in output.completions if c.error is not None]
    if errors:
        return {"error": errors[0]}
    completions = [completion_body(completion) for completion in output.completions]
    body: Result = completions[0] if len(completions) == 1 else {"completions": completions}
    if output.prompt_logprobs is not None:
        body["prompt_logprobs"] = [
            None if logprob is None else logprob_body(logprob) for logprob in output.prompt_logprobs
        ]
    return body


def completion_body(completion: Completion) -> Result:
    body: Result = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.token_ids),
    }
    if completion.logprobs is not None:
        body["logprobs"] = [logprob_body(logprob) for logprob in completion.logprobs]
    return body


def logprob_body(found: TokenLogprob) -> Result:
    return {
        "token_id": found.token_id,
        "logprob": max(found.logprob, LEAST_LOGPROB),
        "likeliest": [[token_id, max(value, LEAST_LOGPROB)] for token_id, value in found.likeliest],
    }


def warn(text: str) -> None:
    """Say it to people; a job goes on where nobody listens any more."""
    with suppress(OSError):
        print(f"paged-kv: {text}", file=sys.stderr)
