"""Random requests through an engine on a simulated model, with faults at random lines.

Every engine lives as long as its traffic; the same seed makes the same choices, as far as no thread
beside it aborts. Whatever strikes, each request ends as it would have alone, or as it was made to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Final

from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.engine.beam_search import BeamSearch, BeamSearchParams
from paged_kv.engine.engine import Engine
from paged_kv.engine.live_request import LiveRequest
from paged_kv.engine.sampling_params import SamplingParams
from paged_kv.errors import NonFiniteLogitsError, OutOfBlocksError, StepFailedError
from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler
from tests.support.faults import DeviceError, Faults, Tally, Violation
from tests.support.guesses import Guesses
from tests.support.simulated_model import (
    VOCAB_SIZE,
    SimulatedRunner,
    expected_beams,
    expected_tokens,
)

GEOMETRIES: Final = {
    "native": (4, 4, 0, 0),
    "sealed": (8, 4, 4, 2),
    "tiny": (4, 2, 2, 3),
    "no head, no tail": (8, 2, 0, 0),
    "tail longer than a block": (4, 2, 2, 9),
}
MAX_MODEL_LEN: Final = 128
ENDS: Final = [1, 2]
ERRORS: Final = (KeyboardInterrupt, MemoryError, RuntimeError)
MOST_STEPS_WITHOUT_TOKEN: Final = 400


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How often something happens in a step."""

    line_fault: float = 0.04
    second_fault: float = 0.15  # of these: another one while the first is mended
    runner_fault: float = 0.01
    spoilt: float = 0.01
    abort: float = 0.02
    abort_inside: float = 0.01
    pause: float = 0.02
    fail_step: float = 0.4  # of steps that failed, if the error is an `Exception`


@dataclass(eq=False, kw_only=True)
class Sent:
    """A request, or a search, and what may become of it."""

    prompt: list[int]
    params: SamplingParams | BeamSearchParams
    found: LiveRequest | BeamSearch
    may_be_aborted: bool = False
    may_be_spoilt: bool = False
    may_fail: bool = False  # with its step
    is_paused: bool = False


class EngineTraffic:
    """One engine, what was sent to it, and what must come back."""

    def __init__(
        self,
        seed: int,
        *,
        rates: Rates | None = None,
        has_thread: bool = False,
        runs_ahead: bool = False,
        speculates: bool = False,
    ) -> None:
        self.seed = seed
        self.runs_ahead, self.speculates = runs_ahead, speculates
        self.rates = Rates() if rates is None else rates
        self.random = random.Random(seed)
        self.tally = Tally()
        self.engine = self._new_engine()
        self.faults = Faults(
            self.engine,
            self.tally,
            self.random,
            errors=ERRORS,
            line_fault=self.rates.line_fault,
            second_fault=self.rates.second_fault,
        )
        self.sent: dict[str, Sent] = {}
        self._prefixes = [self._tokens(self.random.randrange(4, 41)) for _ in range(6)]
        self._number = 0
        self._last_token = 0  # step number
        self._num_steps = 0
        self._in_step: list[str] = []  # names of the requests of the last step that ran
        self._orders: SimpleQueue[str | None] | None = None
        self._thread_error: BaseException | None = None
        if has_thread:
            self._start_thread(SimpleQueue())

    def _new_engine(self) -> Engine:
        choice = self.random.choice
        self.shape = choice(list(GEOMETRIES))
        block, open_block, head, tail = GEOMETRIES[self.shape]
        geometry = BlockGeometry(
            block_size=block,
            open_block_size=open_block,
            num_head_tokens=head,
            min_tail_tokens=tail,
        )
        self._most_sinks = geometry.num_head_tokens if geometry.seals else 4
        most = geometry.max_blocks(MAX_MODEL_LEN)
        manager = BlockManager(
            geometry,
            num_blocks=int(choice([0.9, 1.5, 2.5, 5]) * most),
            max_num_seqs=choice([4, 8, 8, 16]),
            max_model_len=MAX_MODEL_LEN,
            prefix_caching=choice([True, True, True, False]),
            num_host_blocks=choice([0, most // 2, 3 * most]),
        )
        scheduler = Scheduler(
            manager,
            token_budget=choice([12, 32, 64, 256]),
            watermark=choice([0.0, 0.01, 0.1]),
            swap_cost=choice([0.1, 0.5, 1.0]),
        )
        self.runner = SimulatedRunner(scheduler, runs_ahead=self.runs_ahead)
        self.runner.on_run, self.runner.after_run = self._on_run, self._after_run
        self.runner.on_copy = self._after_run
        speculation = Guesses(self).new_speculation() if self.speculates else None
        return Engine(self.runner, scheduler, ENDS, speculation=speculation)  # type: ignore[arg-type]

    def __str__(self) -> str:
        manager, scheduler = self.engine.manager, self.engine.scheduler
        num_host = 0 if manager.host_pool is None else manager.host_pool.num_blocks
        return (
            f"seed {self.seed}, {self.shape}, {manager.num_blocks} blocks, {num_host} on the host, "
            f"{manager.max_num_seqs} sequences, token_budget {scheduler.token_budget}, "
            f"prefix_caching={manager.prefix_cache is not None}, runs_ahead={self.runs_ahead}, "
            f"speculates={self.speculates}, "
            f"step {self._num_steps}"
        )

    # -- the whole ------------------------------------------------------------------------------

    def serve(self, count: int) -> None:
        """So many requests from their arrival to their end; nothing is held afterwards."""
        end = self.tally.num_requests + count
        crowd = 2 * self.engine.manager.max_num_seqs
        while self.tally.num_requests < end or self.sent:
            if len(self.sent) < crowd and self.random.random() < 0.5:
                for _ in range(
                    min(self.random.choice([1, 1, 2, 6]), end - self.tally.num_requests)
                ):
                    self._send()
            self._disturb()
            self._step()
        self._check_empty()

    def close(self) -> None:
        if self._orders is not None:
            self._orders.put(None)
            self._thread.join()

    def fail(self, kind: str, message: str) -> None:
        raise Violation(kind, f"{message}; {self}")

    # -- requests -------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB_SIZE) for _ in range(count)]

    def _prompt(self) -> list[int]:
        if self.random.random() < 0.7:
            prefix = self.random.choice(self._prefixes)
            length = self.random.choice([len(prefix), self.random.randrange(1, len(prefix) + 1)])
            return prefix[:length] + self._tokens(self.random.choice([0, 1, 3, 12]))
        return self._tokens(self.random.choice([1, 5, 20, 60]))

    def _send(self) -> None:
        choice, prompt = self.random.choice, self._prompt()
        salt = choice([None, None, None, None, "0", "1"])
        kind = self.random.random()
        self._number += 1
        names = [str(self._number)]
        if kind < 0.03:
            params = BeamSearchParams(
                num_beams=choice([1, 2, 3]),
                max_tokens=choice([1, 4, 8]),
                cache_salt=salt,
                ignore_eos=choice([True, False]),
            )
            self._enter(names, prompt, params, self.engine.add_search)
            return
        window = None
        if kind < 0.10:
            window = SinkWindow(choice([0, self._most_sinks]), choice([8, 11, 20]))
        n = choice([2, 3, 5]) if 0.10 < kind < 0.16 else 1
        longest = choice([1, 3, 8, 8, 12, 24]) if window is None else choice([10, 60])
        params = SamplingParams(
            temperature=choice([0.0, 0.8, 1.5]),
            seed=self.random.randrange(1 << 40),
            max_tokens=longest,
            min_tokens=choice([0, 0, 0, 2]),
            n=n,
            cache_salt=salt,
            ignore_eos=choice([True, False]),
            stop_token_ids=choice([[], [], [5, 9]]),
            sink_window=window,
        )
        names += [f"{names[0]}.{index}" for index in range(1, n)]
        priority = choice([0, 0, 0, -1, 1, 2])
        self._enter(names, prompt, params, self.engine.add_request, priority=priority)

    def _enter(
        self,
        names: list[str],
        prompt: list[int],
        params: SamplingParams | BeamSearchParams,
        add: Callable[..., Any],
        **options: Any,
    ) -> None:
        """Queue a request; where that is cut off nobody knows how far, and it is taken out."""
        ids = names if isinstance(params, SamplingParams) else names[0]
        for _ in range(10):
            found, error = self.faults.call(add, ids, prompt, params, **options)
            if isinstance(error, OutOfBlocksError):  # beams that never fit
                self.tally.events["refused"] += 1
                return
            if error is None:
                break
            self.faults.until_done(self.engine.abort_all, names)
        else:
            self.fail("lost", f"requests {names} cannot be queued")
        self.tally.num_requests += len(names)
        self.tally.events["samples beside the first"] += len(names) - 1
        self.tally.events["windowed"] += isinstance(params, SamplingParams) and bool(
            params.sink_window
        )
        self.tally.events["beam searches"] += isinstance(params, BeamSearchParams)
        for name, one in zip(names, found if isinstance(found, list) else [found], strict=True):
            self.sent[name] = Sent(prompt=prompt, params=params, found=one)
        self._last_token = self._num_steps

    # -- what happens to them -------------------------------------------------------------------

    def _any(self) -> str:
        return self.random.choice(list(self.sent))

    def _disturb(self) -> None:
        rates, chance = self.rates, self.random.random
        if self.sent and chance() < rates.abort:
            name = self._any()
            self.sent[name].may_be_aborted = True
            if self._orders is not None and chance() < 0.7:
                self._orders.put(name)
                self.tally.events["aborts by another thread"] += 1
            else:
                self.tally.events["aborts between steps"] += 1
                self.faults.until_done(self.engine.abort, name)
                self._look()
        if self.sent and chance() < rates.pause:
            name = self._any()
            self.tally.events["pauses"] += 1
            self.faults.until_done(self.engine.pause, name)
            self.sent[name].is_paused = True
        for name, sent in self.sent.items():
            if sent.is_paused and chance() < 0.1:
                self.faults.until_done(self.engine.resume, name)
                sent.is_paused = False

    def _step(self) -> None:
        self._num_steps += 1
        self._in_step = []
        before = self.engine.num_steps
        updates, error = self.faults.call(self.engine.step, is_absorbed=self.speculates)
        if error is not None and isinstance(error, Exception):
            if self.random.random() < self.rates.fail_step:
                for name in self._names_of_last_step():
                    self.sent[name].may_fail = True
                self.faults.call(self.engine.fail_step, error)
                self.tally.events["steps that ended their requests"] += 1
        elif updates:
            self._last_token = self._num_steps
        if self.engine.num_steps > before:
            self._last_token = self._num_steps
        self._look()
        self.engine.take_ended()
        if self._thread_error is not None:
            self.fail("raised", f"{self._thread_error!r} in another thread")
        if error is not None or self._num_steps % 50 == 0:
            self._check_integrity()
        if self._num_steps - self._last_token > MOST_STEPS_WITHOUT_TOKEN:
            if all(sent.is_paused for sent in self.sent.values()):
                return
            self.fail("lost", f"no step gives a token to any of {sorted(self.sent)}")

    def _names_of_last_step(self) -> list[str]:
        """Of its requests, and of the samples that wait for these to compute their prompt."""
        names = list(self.engine._last_names)
        lives = [self.engine._live[name] for name in names if name in self.engine._live]
        names += [sibling.request_id for live in lives for sibling in live.siblings]
        return [name for name in names if name in self.sent]

    def _check_integrity(self) -> None:
        engine = self.engine
        with engine._lock:  # nobody else is in the middle of a turn
            if not engine._change.is_unfinished and engine.scheduler.is_whole:
                try:
                    engine.scheduler.check_integrity()
                    for live in engine._live.values():  # or nobody would ever start it
                        request = live.request if live.leader is None else live.leader.request
                        assert request.request_id in engine.scheduler._requests
                except AssertionError as error:
                    raise Violation("leaked", f"integrity: {error!r}; {self}") from error

    # -- inside a step --------------------------------------------------------------------------

    def _on_run(self, requests: list[Request]) -> int | None:
        rates, chance = self.rates, self.random.random
        self.tally.events["sequences in steps"] += len(requests)
        if chance() < rates.runner_fault:
            self.tally.note("RuntimeError before the model ran")
            raise DeviceError("before")
        if self.sent and chance() < rates.abort_inside:
            name = self._any()
            self.sent[name].may_be_aborted = True
            self.tally.events["aborts inside a step"] += 1
            self.engine.abort(name)
        if chance() >= rates.spoilt:
            return None
        row = self.random.randrange(len(requests))
        name = requests[row].request_id
        live = self.engine._live.get(name)
        siblings = [] if live is None else [sibling.request_id for sibling in live.siblings]
        for spoilt in [name, *siblings]:
            if spoilt in self.sent:
                self.sent[spoilt].may_be_spoilt = True
        self.tally.note("results that are not finite")
        return row

    def _after_run(self) -> None:
        if self.random.random() < self.rates.runner_fault:
            self.tally.note("RuntimeError after blocks were written")
            raise DeviceError("after")

    # -- a thread beside ------------------------------------------------------------------------

    def _start_thread(self, orders: SimpleQueue[str | None]) -> None:
        def abort_as_told() -> None:
            try:
                while (name := orders.get()) is not None:
                    self.engine.abort(name)
            except BaseException as error:
                self._thread_error = error

        self._orders = orders
        self._thread = Thread(target=abort_as_told, daemon=True)
        self._thread.start()

    # -- what comes back ------------------------------------------------------------------------

    def _look(self) -> None:
        """Compare what has ended with what it is alone."""
        engine = self.engine
        with engine._lock:  # nobody else is in the middle of a turn
            over = [n for n in self.sent if n not in engine._live and n not in engine._searches]
        for name in over:
            sent = self.sent.pop(name)
            if isinstance(sent.found, BeamSearch):
                self._check_search(name, sent, sent.found)
            elif sent.found.finish_reason is None:
                self.fail("lost", f"request {name}")
            else:
                self._check_sample(name, sent, sent.found)

    def _check_end(self, name: str, sent: Sent, reason: str, error: Exception | None) -> None:
        is_right = (
            reason in ("stop", "length")
            or (reason == "abort" and sent.may_be_aborted)
            or (isinstance(error, NonFiniteLogitsError) and sent.may_be_spoilt)
            or (isinstance(error, StepFailedError) and sent.may_fail)
        )
        if not is_right:
            kind = "lost" if reason == "abort" else "changed"
            self.fail(kind, f"request {name} ended with {reason}: {error}")
        self.tally.ends[reason if error is None else type(error).__name__] += 1

    def _check_sample(self, name: str, sent: Sent, live: LiveRequest) -> None:
        reason, params, got = live.finish_reason, sent.params, live.token_ids.tolist()
        assert reason is not None
        assert isinstance(params, SamplingParams)
        self._check_end(name, sent, reason, live.error)
        self.tally.num_tokens += len(got)
        expected = self.alone(sent, live, len(got) + 1)
        is_whole = reason in ("stop", "length")
        if got != (expected if is_whole else expected[: len(got)]):
            self.fail("changed", f"request {name} ({reason}) got {got}, alone {expected}")

    def alone(self, sent: Sent, live: LiveRequest, count: int) -> list[int]:
        """The output of a request, at most so many tokens, if nobody else were there."""
        assert isinstance(sent.params, SamplingParams)
        window = sent.params.sink_window
        return expected_tokens(
            sent.prompt,
            sent.params,
            max_tokens=live.request.max_tokens,
            sample_index=live.sample_index,
            end_token_ids=live.end_token_ids,
            window=None if window is None else window.fitted(self.engine.manager.geometry),
            count=count,
        )

    def _check_search(self, name: str, sent: Sent, search: BeamSearch) -> None:
        assert isinstance(sent.params, BeamSearchParams)
        if not search.is_done:
            self._check_end(name, sent, "abort", None)
            return
        output = search.output
        reason = "length" if output.error is None else "error"
        self._check_end(name, sent, reason, output.error)
        if output.error is not None:
            return
        expected = expected_beams(
            sent.prompt,
            sent.params,
            max_tokens=search.max_tokens,
            end_token_ids=search.end_token_ids,
        )
        got = [hypothesis.token_ids for hypothesis in output.hypotheses]
        if got != expected:
            self.fail("changed", f"search {name} found {got}, alone {expected}")

    def _check_empty(self) -> None:
        engine, manager = self.engine, self.engine.manager
        if self._orders is not None:  # the thread may still be at its last order
            self.close()
            self._start_thread(SimpleQueue())
        engine.step()
        self._check_integrity()
        numbers: Sequence[tuple[str, int]] = (
            ("blocks", manager.num_blocks - manager.num_free_blocks),
            ("sequences", manager.max_num_seqs - manager.num_free_seqs),
            ("host blocks", 0 if manager.host_pool is None else manager.host_pool.num_allocated),
            ("requests", len(engine._live) + len(engine._searches) + len(engine._aborted)),
            ("requests of the scheduler", len(engine.scheduler._requests)),
            (
                "links that never come",
                0 if manager.prefix_cache is None else len(manager.prefix_cache._pending),
            ),
        )
        for name, number in numbers:
            if number:
                self.fail("leaked", f"{number} {name} are held by nobody")
