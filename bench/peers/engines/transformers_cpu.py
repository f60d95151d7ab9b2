"""Hugging Face transformers on a CPU, in the two ways it has of running many requests.

`kv` chooses: "padded" is `generate()` on padded batches, "batching" its continuous batching.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from job import Clock, Job, Round, serve
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteriaList
from transformers.generation import ContinuousBatchingConfig

BATCH_SIZE = 32
CACHE_BYTES = 1 << 30
BLOCK_TOKENS = 32


def prepare(job: Job) -> Callable[[], Round]:
    torch.set_num_threads(job.num_threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=getattr(torch, job.precision))
    model.generation_config.eos_token_id = None
    return {"padded": padded_batches, "batching": continuous_batching}[job.kv](model, job)


def padded_batches(model: torch.nn.Module, job: Job) -> Callable[[], Round]:
    """In the order in which they came, each batch to the longest prompt and answer in it.

    What a request did not ask for is dropped.
    """

    def run() -> Round:
        clock, most = Clock(len(job.prompts)), 0
        for start in range(0, len(job.prompts), BATCH_SIZE):
            prompts = job.prompts[start : start + BATCH_SIZE]
            counts = job.num_new[start : start + BATCH_SIZE]
            longest = max(map(len, prompts))
            ids = torch.zeros(len(prompts), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(prompts):
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1

            def note(
                known: torch.Tensor,
                scores: object,
                start: int = start,
                counts: list[int] = counts,
                longest: int = longest,
            ) -> torch.Tensor:
                """Called after every step; stops nothing."""
                for row, token in enumerate(known[:, -1].tolist()):
                    if known.shape[1] - longest <= counts[row]:
                        clock.note(start + row, [token])
                return torch.zeros(len(known), dtype=torch.bool)

            output = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max(counts),
                stopping_criteria=StoppingCriteriaList([note]),
                return_dict_in_generate=True,
            )
            layers = output.past_key_values.layers
            most = max(most, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        return Round(clock.tokens, clock.times, most)

    return run


def continuous_batching(model: torch.nn.Module, job: Job) -> Callable[[], Round]:
    """The manager under `generate_batch`, because that has one length for all answers."""
    text = model.config.get_text_config()
    head_bytes = model.dtype.itemsize * text.head_dim
    token_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head_bytes
    num_blocks = CACHE_BYTES // (BLOCK_TOKENS * token_bytes)
    manager = model.init_continuous_batching(
        GenerationConfig(do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(
            block_size=BLOCK_TOKENS,
            num_blocks=num_blocks,
            max_batch_tokens=1024,
            allow_block_sharing=job.has_prefix_cache,
        ),
    )
    manager.start()
    rounds = 0

    def run() -> Round:
        nonlocal rounds
        rounds += 1
        done, most, began = {}, 0, time.perf_counter()
        for index, (prompt, count) in enumerate(zip(job.prompts, job.num_new, strict=True)):
            name = f"{rounds}-{index}"
            manager.add_request(prompt, name, max_new_tokens=count, record_timestamps=True)
        while len(done) < len(job.prompts):
            result = manager.get_result(timeout=0.1)
            if result is not None:
                done[int(result.request_id.split("-")[1])] = result
            elif not manager.is_running():
                raise RuntimeError("the thread that generates has ended")
            free = manager.batch_processor.cache.get_num_free_blocks()
            most = max(most, num_blocks - free)
        results = [done[index] for index in range(len(done))]
        return Round(
            [result.generated_tokens for result in results],
            [[stamp - began for stamp in result.timestamps] for result in results],
            most * BLOCK_TOKENS * token_bytes,
        )

    return run


if __name__ == "__main__":
    serve(prepare)
