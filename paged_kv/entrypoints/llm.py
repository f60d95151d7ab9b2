"""Text in, text out: a model, its quantized cache and the engine behind three methods.

Knows prompts and texts, and steps the engine; never blocks or logits.

Many arguments because the settings of an `LLM` are keywords of its own, not of a second object.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..blocks.sink_window import SinkWindow
from ..cache.layer_formats import KVFormats
from ..cache.memory_stats import MemoryStats
from ..engine.beam_search import BeamSearch, BeamSearchParams, Hypothesis
from ..engine.build import build_engine
from ..engine.config import MODELS_OWN, USUAL, EngineConfig
from ..engine.draft_model import DraftModel
from ..engine.engine import Engine
from ..engine.handover import Departure, Handover, PrefilledPrompt
from ..engine.output_processor import OutputProcessor
from ..engine.parallel_group import WorkerGroup, start_group
from ..engine.prompt_lookup import PromptLookup
from ..engine.sampling_params import SamplingParams
from ..engine.store_counts import BlockStoreStatistics
from ..engine.text import Prompt, encode_prompt
from ..errors import ConfigError, GenerationError, InvalidRequestError, PagedKVError
from ..models.attached_model import AttachedModel, Route
from ..models.calibration import Calibration
from ..models.loading import Source, parse_device, parse_dtype
from ..models.routes import choose_route
from ..models.widening import computes_wide
from ..scheduler.statistics import SchedulerStatistics
from ..stores.block_store import BlockStore
from ..stores.opening import USUAL_SIZE
from ..validation import is_list_of
from .batch import as_batch, as_params, handovers_of, naming_prompt
from .outputs import Completion, OutputAssembler, RequestOutput, StreamEvent
from .progress import Progress
from .stream import Stream
from .text_engine import Output, TextEngine


class LLM:
    """A Hugging Face causal language model that decodes many requests on quantized KV blocks.

    `model` is a local folder, a hub name, a GGUF file (or the `gguf_file` of a folder or hub name)
    or a loaded model, which this object takes over until `close()`, also one that peft has wrapped
    or that has adapters (see `adapters`); of a hub name `revision` says which version, and
    `trust_remote_code` lets its own code run. `kv_format` is the name of one of `FORMATS` ("int8/0"
    also quantizes first tokens) or a `KVFormat`, or which layer has which: "int2,0=int8,-1=native"
    or {"default": "int2", 0: "int8", -1: "native"}, or a list with one for each layer. What is not
    quantized of a sequence has `kv_dtype`: without it the model's precision, but bfloat16 beside
    quantized tokens of a float32 model. `dtype` is the precision to load and compute in; without it
    all have the checkpoint's, but a CPU without a unit for it computes in float32; dtypes may be
    names, and "auto" is None. A `device` of "auto" is a GPU where there is one. Formats below 8
    bits want to know what the model's queries and keys are like: the `calibration` is one of
    `paged-kv calibrate` or its file, "usual" makes one from a text that comes with the library,
    once, and keeps it; None does without. The pool is sized by `num_blocks` or by `kv_memory`
    (bytes, or text such as "2GiB"); without either by what `max_num_seqs` full-length sequences
    need, at most 1 GiB and at most half of the memory that is free. A step runs at most
    `max_num_seqs` sequences and `token_budget` tokens, of one prompt at most `max_prefill_tokens`.
    With a `max_slowdown` prompts are computed in such small pieces beside requests that decode that
    a step takes at most about so many times as long as without them: tokens come evenly, prompts
    wait longer; but a request that has waited for six steps to begin is computed whatever that
    takes. With `prefix_caching` prompts that begin alike share their blocks, also with earlier
    ones; with `record_events` what happens to cached blocks is kept until
    `engine.manager.take_events()`. With a `block_store`, a folder, a url or a `BlockStore`, they
    outlive this object, in at most `block_store_size` bytes, and others that are made alike find
    them. Sequences that must make room go to `swap_space` bytes of host memory where that is
    cheaper than computing them again. On a CPU model and kernels share torch's threads;
    `num_threads` sets how many there are, for the whole process. On a GPU decode steps are captured
    as graphs, which `enforce_eager` leaves out. With a `sink_window` every request is windowed: it
    keeps attention sinks and a window of newest tokens, and may go on beyond the model's length,
    for ever, in constant memory. What the model's generation config asks for, as a repetition
    penalty or sampling, holds for every request that says nothing else; with `generation_config`
    None only its end tokens count. With `speculation` a step tries guesses of several next tokens
    at once, out of what was there before or of a smaller model's: tokens are the same, steps are
    fewer. Several threads may use one LLM: their requests are decoded together, and each waits
    while another one steps the engine."""

    tokenizer: PreTrainedTokenizerBase | None
    engine: Engine

    def __init__(
        self,
        model: str | Path | PreTrainedModel | torch.nn.Module,
        *,
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        kv_format: KVFormats = "int8",
        kv_dtype: torch.dtype | str | None = None,
        calibration: Calibration | str | Path | None = USUAL,
        kv_memory: int | str | None = None,
        num_blocks: int | None = None,
        max_num_seqs: int = 64,
        token_budget: int = 1024,
        max_prefill_tokens: int | None = None,
        max_slowdown: float | None = None,
        max_model_len: int | None = None,
        prefix_caching: bool = True,
        record_events: bool = False,
        block_store: BlockStore | str | PathLike[str] | None = None,
        block_store_size: int | str = USUAL_SIZE,
        swap_space: int | str = 0,
        num_threads: int | None = None,
        enforce_eager: bool = False,
        sink_window: SinkWindow | None = None,
        generation_config: str | None = MODELS_OWN,
        speculation: PromptLookup | DraftModel | None = None,
        tensor_parallel_size: int = 1,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        config = EngineConfig(
            kv_format=kv_format,
            kv_dtype=parse_dtype(kv_dtype, "kv_dtype"),
            calibration=calibration,
            kv_memory=kv_memory,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            token_budget=token_budget,
            max_prefill_tokens=max_prefill_tokens,
            max_slowdown=max_slowdown,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
            record_events=record_events,
            block_store=block_store,
            block_store_size=block_store_size,
            swap_space=swap_space,
            num_threads=num_threads,
            enforce_eager=enforce_eager,
            sink_window=sink_window,
            generation_config=generation_config,
            speculation=speculation,
            tensor_parallel_size=tensor_parallel_size,
        )
        source = Source(gguf_file, revision, trust_remote_code)
        self._group, self._model, self.tokenizer, self.engine = start(
            model, source, tokenizer, parse_dtype(dtype), config, parse_device(device)
        )
        self.requests: Final = TextEngine(self.engine, OutputProcessor(self.tokenizer))

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model its own attention back; this object cannot be used afterwards.

        What is still to be written to a block store is written first. Other processes that compute
        the model have ended when this returns.
        """
        self.engine.tier.close()
        if self.engine.speculation is not None:
            self.engine.speculation.close()
        let_go(self._model, self._group)

    @property
    def max_model_len(self) -> int:
        return self.engine.manager.max_model_len

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the model's adapters, for `SamplingParams(adapter=...)`, also of later ones."""
        return self._model.adapters.names

    @property
    def route(self) -> Route:
        """How the model reads blocks: "fused", by our kernels, or by "gather", where it cannot."""
        return self._model.route

    def memory_stats(self) -> MemoryStats:
        """What the pool holds now, in all processes, and what there is beside it."""
        stats = self.engine.cache.memory_stats(self.engine.manager)
        graphs = self.engine.runner.graphs
        stats = replace(
            stats,
            decode_graphs=0 if graphs is None else graphs.num_bytes,
            recurrent_states=self._model.state_bytes(self.engine.cache),
        )
        return stats.times(self.engine.cache.num_parts)

    def statistics(self) -> SchedulerStatistics:
        """Requests, blocks, preemptions and the prefix cache's hits: now, and so far."""
        return self.engine.scheduler.statistics()

    def block_store_statistics(self) -> BlockStoreStatistics | None:
        """Entries of the block store that were written and found, and why others were not; None
        without one."""
        return self.engine.tier.statistics

    def bytes_per_token(self) -> float:
        """Bytes of one sealed token over all layers (native: of one token), in all processes."""
        return self.engine.cache.bytes_per_token() * self.engine.cache.num_parts

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks, as after a change of the model's weights.

        Those in a block store stay, for models that are as this one was. Raises
        `InvalidStepError` while requests run.
        """
        self.engine.manager.reset_prefix_cache()
        self.engine.tier.model_changed()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priorities: Sequence[int] | None = None,
        show_progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continue one prompt or many, in order. `params` are one for all or one for each.

        Every prompt is checked before any is queued. If requests fail while they run, the others
        are served and `GenerationError` carries all outputs. `show_progress` None shows a progress
        bar on a terminal when the work is long.
        """
        batch = as_batch(prompts)
        per_prompt = as_params(params, len(batch))
        token_ids = self._check_all(batch, per_prompt, priorities)
        handovers = handovers_of(batch)
        assembler = OutputAssembler(batch, token_ids, per_prompt)
        total = sum(p.num_samples for p in per_prompt)
        with Progress(total, self.engine, show_progress) as progress:
            for event in self._run(token_ids, per_prompt, priorities, handovers):
                assembler.add(event)
                progress.update(is_finished=event.finish_reason is not None)
        outputs = assembler.outputs
        raise_failures(outputs)
        return outputs

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priorities: Sequence[int] | None = None,
        keep_going: bool = False,
    ) -> Iterator[StreamEvent]:
        """Like `generate`, but yields every token as it comes.

        The prompts are checked by this call and queued when iteration begins; closing the
        iterator aborts those that are left. A request that fails ends with an event that carries
        its `error`. One whose events are not taken waits after some hundred of them, and others go
        on. An exception of a step, as out of memory, is raised here and aborts what is left; with
        `keep_going` it ends the requests of that step only, with events that carry it. With
        `best_of` all samples are told of, and it is for the caller to compare them.
        """
        batch = as_batch(prompts)
        per_prompt = as_params(params, len(batch))
        if not keep_going and any(p.num_samples > p.n for p in per_prompt):
            raise ConfigError("best_of compares finished continuations: use generate")
        token_ids = self._check_all(batch, per_prompt, priorities)
        handovers = handovers_of(batch)
        return self._run(token_ids, per_prompt, priorities, handovers, keep_going=keep_going)

    def prefill(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> bytes:
        """Compute a prompt and its first token, to go on with in another process.

        The other one has the same model and format and gives these bytes to `generate` as a
        `PrefilledPrompt`, with the same `params`: with a seed, or greedy, its tokens are those that
        this process would have gone on with. Raises as `generate` does.
        """
        departure, (params,) = Departure(), as_params(params, 1)
        token_ids = self.check(prompt, params, priority, departure)
        assembler = OutputAssembler([prompt], [token_ids], [params])
        for event in self._run([token_ids], [params], [priority], [departure]):
            assembler.add(event)
        raise_failures(assembler.outputs)
        return departure.taken()

    def open_stream(self, sink_window: SinkWindow | None = None) -> Stream:
        """A sequence without end, to be fed and asked for more; closing it frees its memory.

        It keeps the sinks and the window that are given, or those of this LLM.
        """
        return Stream(self, sink_window)

    def beam_search(
        self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams | None = None
    ) -> list[RequestOutput]:
        """Continue one prompt or many, in order, by beam search: completions are best first.

        Their `log_probability` is the score by which they are ordered. Every prompt is checked
        before any is computed, and `GenerationError` tells of those that failed, as `generate`
        does.
        """
        params = BeamSearchParams() if params is None else params
        if not isinstance(params, BeamSearchParams):
            raise ConfigError(f"params must be BeamSearchParams, got {params!r}")
        batch = as_batch(prompts)
        most = self.engine.intake.max_prompt_tokens(params)
        token_ids = []
        for index, prompt in enumerate(batch):
            with naming_prompt(index, len(batch)):
                if isinstance(prompt, PrefilledPrompt):
                    raise InvalidRequestError("a beam search does not begin elsewhere")
                token_ids.append(encode_prompt(prompt, self.tokenizer, most))
                self.engine.intake.search("", token_ids[-1], params)
        found = [search.output for search in self._search(token_ids, params)]
        outputs = [
            RequestOutput(
                prompt=prompt,
                prompt_token_ids=ids,
                completions=[self._complete(ids, hypothesis) for hypothesis in beams.hypotheses]
                or [Completion(finish_reason="error", error=beams.error)],
            )
            for prompt, ids, beams in zip(batch, token_ids, found, strict=True)
        ]
        raise_failures(outputs)
        return outputs

    def _search(self, prompts: Sequence[list[int]], params: BeamSearchParams) -> list[BeamSearch]:
        """Queue searches and step the engine until they are over."""
        names = self.requests.new_ids(len(prompts))
        searches: list[BeamSearch] = []
        try:
            for name, token_ids in zip(names, prompts, strict=True):
                searches.append(self.engine.add_search(name, token_ids, params))
            while not all(search.is_done for search in searches):
                if not all(search.is_done or search.request.is_unfinished for search in searches):
                    raise PagedKVError("a beam search was aborted by somebody else")
                self.requests.step()
            return searches
        finally:
            try:
                self.requests.let_go(names)
            except BaseException:  # as a second interrupt: nobody else would do it
                self.requests.let_go(names)
                raise

    def _complete(self, prompt_token_ids: list[int], hypothesis: Hypothesis) -> Completion:
        """A hypothesis with its text, to which a token that ends it adds nothing."""
        is_stop = hypothesis.finish_reason == "stop"
        token_ids = hypothesis.token_ids[: -1 if is_stop else None]
        return Completion(
            text=self.requests.processor.text_of(prompt_token_ids, token_ids),
            token_ids=hypothesis.token_ids,
            finish_reason=hypothesis.finish_reason,
            log_probability=hypothesis.score,
        )

    def check(
        self,
        prompt: Prompt,
        params: SamplingParams,
        priority: int = 0,
        handover: Handover | None = None,
    ) -> list[int]:
        """Token ids of a prompt that can be served; raises `InvalidRequestError` if it cannot, and
        `TransferError` where it is a `PrefilledPrompt` of something else."""
        if isinstance(prompt, PrefilledPrompt):
            if handover is not None:
                raise InvalidRequestError("a prefilled prompt is not computed once more")
            handover = prompt
        most = self.engine.intake.max_prompt_tokens(params)
        token_ids = encode_prompt(prompt, self.tokenizer, most)
        intake = self.engine.intake
        params = intake.completed(params)
        intake.rules(intake.request("", token_ids, params, priority, handover), params)
        self.requests.processor.check(params)
        return token_ids

    def _check_all(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        priorities: Sequence[int] | None,
    ) -> list[list[int]]:
        if priorities is not None and not is_list_of(priorities, lambda p: True):
            raise ConfigError(f"priorities must be a list of integers, got {priorities!r}")
        if priorities is not None and len(priorities) != len(prompts):
            raise ConfigError(f"{len(prompts)} prompts, but {len(priorities)} priorities")
        ranks = priorities if priorities is not None else [0] * len(prompts)
        checked = []
        for index, (prompt, p, rank) in enumerate(zip(prompts, params, ranks, strict=True)):
            with naming_prompt(index, len(prompts)):
                checked.append(self.check(prompt, p, rank))
        return checked

    def _run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[SamplingParams],
        priorities: Sequence[int] | None,
        handovers: Sequence[Handover | None],
        *,
        keep_going: bool = False,
    ) -> Iterator[StreamEvent]:
        """Queue requests and step the engine until they are over."""
        requests, left = self.requests, set[str]()
        ready: deque[Output] = deque()
        try:
            for prompt_index, (token_ids, p) in enumerate(zip(prompts, params, strict=True)):
                request_ids = requests.new_ids(p.num_samples)
                priority = 0 if priorities is None else priorities[prompt_index]
                left.update(request_ids)
                requests.add(
                    request_ids,
                    token_ids,
                    p,
                    ready.append,
                    priority=priority,
                    prompt_index=prompt_index,
                    handover=handovers[prompt_index],
                )
            while left:
                if not ready:
                    requests.step(lambda: ready, keep_going=keep_going)
                    continue
                output = ready[0]
                if output.text.is_paused:
                    requests.resume(output.text)
                update = output.text.take()
                if update is None:
                    ready.popleft()
                    continue
                if update.finish_reason is not None:
                    requests.forget(output.text.live.request_id)
                    left.discard(output.text.live.request_id)
                yield output.event(update)
        finally:
            try:
                requests.let_go(left)
            except BaseException:  # as a second interrupt: nobody else would do it
                requests.let_go(left)
                raise


def start(
    model: str | Path | PreTrainedModel | torch.nn.Module,
    source: Source,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    config: EngineConfig,
    device: torch.device | str | None,
) -> tuple[WorkerGroup | None, AttachedModel, PreTrainedTokenizerBase | None, Engine]:
    """The processes that share a model, the model on blocks, its tokenizer, and its engine."""
    group: WorkerGroup | None = None
    attached: AttachedModel | None = None
    try:
        if config.tensor_parallel_size > 1:
            group, attached, tokenizer = start_group(
                model, source, tokenizer, dtype, config, device
            )
        else:
            loaded, tokenizer = source.load(model, tokenizer, dtype)
            widens = dtype is None and computes_wide(loaded, device)
            attached = choose_route(loaded, widens=widens)
        engine = build_engine(attached, config, device, tokenizer, group)
    except BaseException:
        let_go(attached, group)
        raise
    return group, attached, tokenizer, engine


def let_go(model: AttachedModel | None, group: WorkerGroup | None) -> None:
    if model is not None:
        model.close()
    if group is not None:
        group.close()


def raise_failures(outputs: list[RequestOutput]) -> None:
    """Raise `GenerationError` if any completion failed; it names the first that did."""
    completions = [
        (index, sample, len(output.completions), completion)
        for index, output in enumerate(outputs)
        for sample, completion in enumerate(output.completions)
    ]
    failed = [place for place in completions if place[3].error is not None]
    if not failed:
        return
    index, sample, num_samples, completion = failed[0]
    name = f"prompt {index}" + (f", sample {sample}" if num_samples > 1 else "")
    raise GenerationError(
        f"{len(failed)} of {len(completions)} requests failed: {name}: {completion.error}", outputs
    ) from completion.error
