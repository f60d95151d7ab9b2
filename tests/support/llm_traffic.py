"""Random requests through an `LLM` on a small real model, with faults at random lines.

Callers stream, generate and search beams side by side. What an exception, an abort or a failing
step takes from one of them it sends again; all that it is given are the tokens of an `LLM` that
nothing disturbs. Tokens that rounding decides are asked of nobody: a step's sums depend a little on
what else is in it.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Generator
from dataclasses import dataclass, field
from threading import Thread, get_ident
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from paged_kv import LLM, BeamSearchParams, SamplingParams
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.entrypoints.outputs import RequestOutput, StreamEvent
from paged_kv.errors import GenerationError, NonFiniteLogitsError, PagedKVError, StepFailedError
from paged_kv.scheduler.request import Request
from tests.support.faults import DeviceError, Faults, Tally, Violation

VOCAB_SIZE: Final = 64
ERRORS: Final = (KeyboardInterrupt, MemoryError)
TURN: Final = 40  # requests
ROUNDING: Final = 1e-3  # far more than what a logit differs by between batches
CALM_TRIES: Final = 8  # of a job, before nothing disturbs it any more
MOST_TRIES: Final = 40


@dataclass(frozen=True, kw_only=True)
class LLMRates:
    """How often something happens in a call, or in a step."""

    line_fault: float = 0.015
    second_fault: float = 0.1  # of these
    runner_fault: float = 0.005
    spoilt: float = 0.005
    close: float = 0.005  # a stream, or it is just dropped
    drop_inside: float = 0.005  # a stream in the middle of a step


@dataclass(eq=False, kw_only=True)
class Job:
    """A prompt, and what comes of it undisturbed."""

    prompt: list[int]
    params: SamplingParams | BeamSearchParams
    priority: int
    expected: list[list[int]]
    got: list[list[int]] = field(default_factory=list)
    is_done: list[bool] = field(default_factory=list)
    may_be_spoilt: bool = False
    may_fail: bool = False  # with its step
    has_failed: bool = False
    num_tries: int = 0

    def begin(self) -> None:
        self.got = [[] for _ in self.expected]
        self.is_done = [False] * len(self.expected)
        self.may_be_spoilt = self.may_fail = self.has_failed = False
        self.num_tries += 1

    def spoil(self) -> None:
        self.may_be_spoilt = True


@dataclass(eq=False)
class Caller:
    """A stream, and what it was asked for."""

    jobs: list[Job]
    events: Generator[StreamEvent, None, None]
    keeps_going: bool
    is_over: bool = False


def tiny_llama() -> LlamaForCausalLM:
    """With wide weights, so that tokens vary."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    return LlamaForCausalLM(config).eval()


class LLMTraffic:
    """One LLM with little room, disturbed, and one with enough, which says what must come."""

    def __init__(self, seed: int, *, rates: LLMRates | None = None) -> None:
        self.seed = seed
        self.rates = LLMRates() if rates is None else rates
        self.random = random.Random(seed)
        self.tally = Tally()
        model = tiny_llama()
        calm = copy.deepcopy(model)
        self._shift = ROUNDING * torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
        calm.lm_head.register_forward_hook(lambda module, arguments, logits: logits + self._shift)
        self.alone = LLM(calm, kv_format="native", max_num_seqs=16, num_blocks=400)
        self.llm = LLM(
            model,
            kv_format="native",
            num_blocks=16,
            max_num_seqs=8,
            token_budget=24,
            swap_space="16KiB",
        )
        engine = self.llm.engine
        self.faults = Faults(
            engine,
            self.tally,
            self.random,
            errors=ERRORS,
            line_fault=self.rates.line_fault,
            second_fault=self.rates.second_fault,
        )
        self._run, engine.runner.run = engine.runner.run, self._run_under_faults  # type: ignore[method-assign]
        self._fail_step, engine.fail_step = engine.fail_step, self._note_failing_step  # type: ignore[method-assign]
        self._spoilt_token: int | None = None
        model.model.layers[0].self_attn.k_proj.register_forward_hook(self._spoil)
        self._prefixes = [self._tokens(length) for length in (20, 34, 50)]
        self._number = 0
        self._jobs: dict[tuple[int, ...], Job] = {}  # of this turn, by prompt
        self._callers: list[Caller] = []
        self._current: Caller | None = None
        self._is_calm = False
        self._thread = get_ident()

    def close(self) -> None:
        self.llm.close()
        self.alone.close()

    def __str__(self) -> str:
        return f"real engine, seed {self.seed}, after {self.tally.num_requests} requests"

    def fail(self, kind: str, message: str) -> None:
        raise Violation(kind, f"{message}; {self}")

    # -- jobs -----------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB_SIZE) for _ in range(count)]

    def _new_job(self) -> Job:
        """Its prompt is like no other one of its turn: by it its requests are known."""
        choice = self.random.choice
        prompt = choice([[], *self._prefixes])[: choice([8, 33, 50])] + self._tokens(choice([1, 9]))
        self._number += 1
        prompt += [self._number % VOCAB_SIZE, self._number // VOCAB_SIZE % VOCAB_SIZE]
        params: SamplingParams | BeamSearchParams
        if self.random.random() < 0.04:
            params = BeamSearchParams(num_beams=choice([2, 3]), max_tokens=choice([3, 8]))
        else:
            is_windowed = self.random.random() < 0.08
            params = SamplingParams(
                temperature=choice([0.0, 0.0, 1.0, 1.5]),
                seed=self.random.randrange(1 << 40),
                max_tokens=choice([50, 90]) if is_windowed else choice([1, 4, 9, 14, 30]),
                n=choice([1] * 9 + [3]),
                cache_salt=choice([None, None, "a"]),
                sink_window=SinkWindow(4, 24) if is_windowed else None,
            )
        return Job(prompt=prompt, params=params, priority=choice([0, 0, 1]), expected=[])

    def _new_jobs(self, count: int) -> list[Job]:
        jobs: list[Job] = []
        while sum(map(num_samples, jobs)) < count:
            jobs.append(self._new_job())
        expected = self._tokens_alone(jobs)
        self._shift.neg_()
        is_sure = [a == b for a, b in zip(expected, self._tokens_alone(jobs), strict=True)]
        for job, tokens in zip(jobs, expected, strict=True):
            job.expected = tokens
        return [job for job, sure in zip(jobs, is_sure, strict=True) if sure]

    def _tokens_alone(self, jobs: list[Job]) -> list[list[list[int]]]:
        """What comes of jobs undisturbed, by sample."""
        sampled = [job for job in jobs if isinstance(job.params, SamplingParams)]
        outputs = self.alone.generate(
            [job.prompt for job in sampled], [job.params for job in sampled], show_progress=False
        )
        of_sampled = iter(outputs)
        return [
            tokens_of(self.alone.beam_search([job.prompt], job.params)[0])
            if isinstance(job.params, BeamSearchParams)
            else tokens_of(next(of_sampled))
            for job in jobs
        ]

    # -- the whole ------------------------------------------------------------------------------

    def serve(self, count: int, *, has_thread: bool = False) -> None:
        """So many requests, some of them through another thread; nothing is held afterwards."""
        end = self.tally.num_requests + count
        while self.tally.num_requests < end:
            jobs = self._new_jobs(TURN)
            self._jobs = {tuple(job.prompt): job for job in jobs}
            self.tally.num_requests += sum(map(num_samples, jobs))
            errors: list[BaseException] = []
            theirs = [job for job in jobs[::4] if has_thread]
            thread = Thread(target=self._generate_all, args=(theirs, errors), daemon=True)
            thread.start()
            self._serve([job for job in jobs if job not in theirs])
            thread.join(timeout=120)
            if thread.is_alive():
                self.fail("lost", "another thread's requests do not come to an end")
            if errors:
                raise Violation("raised", f"{errors[0]!r} in another thread; {self}") from errors[0]
            self._check_empty()

    def _serve(self, todo: list[Job]) -> None:
        """Streams, `generate` and `beam_search` by turns, until nothing is left to do."""
        while todo or self._callers:
            if todo and len(self._callers) < 3:
                self._begin(todo)
            else:
                self._go_on(self.random.choice(self._callers))
            for caller in [caller for caller in self._callers if caller.is_over]:
                self._callers.remove(caller)
                todo += [job for job in caller.jobs if not all(job.is_done)]

    def _begin(self, todo: list[Job]) -> None:
        """A new stream for some of the jobs, or a call that serves them at once."""
        is_search = isinstance(todo[0].params, BeamSearchParams)
        alike = [j for j in todo if isinstance(j.params, BeamSearchParams) == is_search]
        jobs = alike[: 1 if is_search else self.random.choice([1, 4, 12])]
        for job in jobs:
            todo.remove(job)
            self._begin_job(job)
        if is_search:
            prompt, params = jobs[0].prompt, jobs[0].params
            self._block(jobs, self.faults.call(self.llm.beam_search, [prompt], params))
            todo += [job for job in jobs if not all(job.is_done)]
            return
        prompts, params = [job.prompt for job in jobs], [job.params for job in jobs]
        options: dict[str, Any] = {"priorities": [job.priority for job in jobs]}
        if self.random.random() < 0.1:
            call = self.faults.call(
                self.llm.generate, prompts, params, show_progress=False, **options
            )
            self._block(jobs, call)
            todo += [job for job in jobs if not all(job.is_done)]
            return
        keeps_going = self.random.random() < 0.4
        events = self.llm.stream(prompts, params, keep_going=keeps_going, **options)  # type: ignore[arg-type]
        self._callers.append(Caller(jobs, events, keeps_going))  # type: ignore[arg-type]

    def _begin_job(self, job: Job) -> None:
        job.begin()
        self._is_calm = job.num_tries > CALM_TRIES
        self.faults.line_fault = 0.0 if self._is_calm else self.rates.line_fault
        if job.num_tries > MOST_TRIES:
            self.fail("lost", f"{job.params} is never served")

    def _go_on(self, caller: Caller) -> None:
        chance = 1.0 if self._is_calm else self.random.random()
        if chance < self.rates.close:
            self.tally.events["streams closed"] += 1
            self.faults.until_done(caller.events.close)
            caller.is_over = True
            return
        if chance < 2 * self.rates.close:
            self.tally.events["streams dropped"] += 1
            del caller.events
            caller.is_over = True
            return
        self._current = caller
        event, error = self.faults.call(
            next, caller.events, name="next", is_absorbed=caller.keeps_going
        )
        if event is not None:
            self._take(caller.jobs[event.prompt_index], event)
            return
        caller.is_over = True
        if isinstance(error, StopIteration):
            for job in caller.jobs:
                if not all(job.is_done) and not job.has_failed:
                    self.fail("lost", f"a stream ended before {job.params}")

    def _take(self, job: Job, event: StreamEvent) -> None:
        got = job.got[event.sample_index]
        if event.error is not None:
            self._check_error(job, event.error)
            return
        assert event.token_id is not None
        got.append(event.token_id)
        self.tally.num_tokens += 1
        expected = job.expected[event.sample_index]
        is_over = event.finish_reason is not None
        if got != (expected if is_over else expected[: len(got)]):
            self.fail("changed", f"{job.params} got {got} ({event.finish_reason}), not {expected}")
        if is_over:
            self.tally.ends[str(event.finish_reason)] += 1
        job.is_done[event.sample_index] = is_over

    def _check_error(self, job: Job, error: PagedKVError) -> None:
        is_right = (isinstance(error, NonFiniteLogitsError) and job.may_be_spoilt) or (
            isinstance(error, StepFailedError) and job.may_fail
        )
        if not is_right:
            self.fail("changed", f"{job.params} ended with {error!r}")
        self.tally.ends[f"{type(error).__name__}, sent again"] += 1
        job.has_failed = True

    def _block(self, jobs: list[Job], outcome: tuple[Any, BaseException | None]) -> None:
        """Of a call that serves all at once."""
        outputs, error = outcome
        if isinstance(error, GenerationError):
            outputs = error.outputs
        elif error is not None:
            return
        for job, output in zip(jobs, outputs, strict=True):
            errors = [c.error for c in output.completions if c.error is not None]
            for each in errors:
                self._check_error(job, each)
            if errors:
                continue
            if tokens_of(output) != job.expected:
                self.fail("changed", f"{job.params} got {tokens_of(output)}, not {job.expected}")
            self.tally.num_tokens += sum(map(len, job.expected))
            for completion in output.completions:
                self.tally.ends[str(completion.finish_reason)] += 1
            job.is_done = [True] * len(job.expected)

    def _generate_all(self, todo: list[Job], errors: list[BaseException]) -> None:
        """What another thread does meanwhile, whose own lines nothing strikes."""
        try:
            while todo:
                for job in todo:
                    self._begin_job(job)
                jobs = [job for job in todo if isinstance(job.params, SamplingParams)] or todo[:1]
                prompts, params = [job.prompt for job in jobs], [job.params for job in jobs]
                try:
                    if isinstance(params[0], BeamSearchParams):
                        self._block(jobs, (self.llm.beam_search(prompts, params[0]), None))
                    else:
                        self._block(jobs, (self.llm.generate(prompts, params), None))  # type: ignore[arg-type]
                except (GenerationError, DeviceError) as error:
                    self._block(jobs, (None, error))
                todo = [job for job in todo if not all(job.is_done)]
        except BaseException as error:
            errors.append(error)

    # -- inside a step --------------------------------------------------------------------------

    def _run_under_faults(self, plan: Any, *arguments: Any) -> Any:
        rates, chance = self.rates, self.random.random
        if self._is_calm:
            return self._run(plan, *arguments)
        self._drop_inside(rates.drop_inside)
        if chance() < rates.runner_fault:
            self.tally.note("RuntimeError before the model ran")
            raise DeviceError("before")
        if chance() < rates.spoilt:
            row = self.random.randrange(len(plan.seq_ids))
            self._job_of(self.llm.engine.scheduler._running.by_seq_id[plan.seq_ids[row]]).spoil()
            self._spoilt_token = int(plan.query_start_loc[row])
            self.tally.note("results that are not finite")
        result = self._run(plan, *arguments)
        if chance() < rates.runner_fault:
            self.tally.note("RuntimeError after blocks were written")
            raise DeviceError("after")
        return result

    def _spoil(self, module: nn.Module, arguments: object, output: Tensor) -> Tensor | None:
        """Keys [1, T, ...] of one token are not finite, once."""
        token, self._spoilt_token = self._spoilt_token, None
        if token is None:
            return None
        output = output.clone()
        output[:, token] = torch.nan
        return output

    def _drop_inside(self, rate: float) -> None:
        """A stream that nobody refers to any more ends in the middle of somebody else's step."""
        if get_ident() != self._thread or self.random.random() >= rate:
            return
        others = [c for c in self._callers if c is not self._current and not c.is_over]
        if others:
            caller = self.random.choice(others)
            del caller.events
            caller.is_over = True
            self.tally.events["streams dropped inside a step"] += 1

    def _job_of(self, request: Request) -> Job:
        return self._jobs[tuple(request.prompt_token_ids.tolist())]  # type: ignore[union-attr]

    def _note_failing_step(self, error: Exception) -> int:
        engine = self.llm.engine
        known = {live.request_id: live.request for live in engine._live.values()}
        known |= {name: search.request for name, search in engine._searches.items()}
        names = [name for name in engine._last_names if name in known]
        if names:
            for name in names:
                self._job_of(known[name]).may_fail = True
            self.tally.events["steps that ended their requests"] += 1
        return self._fail_step(error)

    def _check_empty(self) -> None:
        engine, manager = self.llm.engine, self.llm.engine.manager
        engine.abort("")  # takes out what is still to be taken out
        try:
            engine.scheduler.check_integrity()
        except AssertionError as error:
            raise Violation("leaked", f"integrity: {error!r}; {self}") from error
        host = manager.host_pool
        numbers = {
            "blocks": manager.num_blocks - manager.num_free_blocks,
            "sequences": manager.max_num_seqs - manager.num_free_seqs,
            "host blocks": 0 if host is None else host.num_allocated,
            "requests": len(engine._live) + len(engine._searches) + len(engine._aborted),
            "outputs": len(self.llm.requests),
        }
        for name, number in numbers.items():
            if number:
                self.fail("leaked", f"{number} {name} are held by nobody")


def num_samples(job: Job) -> int:
    return job.params.num_samples if isinstance(job.params, SamplingParams) else 1


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.completions]
