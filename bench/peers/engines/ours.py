"""paged_kv, as `LLM` runs it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from job import Clock, Job, Round, serve

from paged_kv import LLM, SamplingParams


def prepare(job: Job) -> Callable[[], Round]:
    llm = LLM(
        job.model,
        kv_format=job.kv,
        dtype=getattr(torch, job.precision),
        kv_memory="1GiB",
        max_num_seqs=64,
        max_model_len=job.longest,
        prefix_caching=job.has_prefix_cache,
        num_threads=job.num_threads,
    )
    params = [
        SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in job.num_new
    ]

    def run() -> Round:
        clock, most = Clock(len(job.prompts)), 0
        for number, event in enumerate(llm.stream(job.prompts, params)):
            clock.note(event.prompt_index, [event.token_id])
            if number % (8 * len(job.prompts)) == 0:  # takes longer than to make a token
                most = max(most, llm.memory_stats().allocated)
        return Round(clock.tokens, clock.times, most)

    return run


if __name__ == "__main__":
    serve(prepare)
