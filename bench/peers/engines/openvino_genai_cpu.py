"""OpenVINO GenAI's continuous batching, on the model of a GGUF file that it converts itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as genai
from job import Clock, Job, Round, serve


def prepare(job: Job) -> Callable[[], Round]:
    gguf = Path(job.extra["gguf"])
    if not (gguf.parent / "openvino_model.xml").exists():
        genai.LLMPipeline(gguf, "CPU", enable_save_ov_model=True)
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.max_num_seqs = 64
    scheduler.max_num_batched_tokens = 1024
    scheduler.enable_prefix_caching = job.has_prefix_cache
    properties = {
        "INFERENCE_NUM_THREADS": job.num_threads,
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[job.precision],
        "KV_CACHE_PRECISION": job.kv,
    }
    pipeline = genai.ContinuousBatchingPipeline(gguf.parent, scheduler, "CPU", properties)

    def run() -> Round:
        clock, handles, most = Clock(len(job.prompts)), [], 0.0
        for index, (prompt, count) in enumerate(zip(job.prompts, job.num_new, strict=True)):
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos = count, True
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(pipeline.add_request(index, ids, config))
        while pipeline.has_non_finished_requests():
            pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        clock.note(index, list(output.generated_ids))
            most = max(most, pipeline.get_metrics().kv_cache_size_in_bytes * used(pipeline))
        return Round(clock.tokens, clock.times, int(most) or None)

    return run


def used(pipeline: genai.ContinuousBatchingPipeline) -> float:
    return float(pipeline.get_metrics().cache_usage) / 100


if __name__ == "__main__":
    serve(prepare)
