"""A serving loop of one's own: paged_kv keeps the blocks, a toy attention layer is the model.

    python examples/embed.py

Twelve prompts share their first 300 tokens and run at most eight at a time, on int2 blocks.
"""

import numpy as np
import torch

from paged_kv import INT2, LayerSpec, PagedKVCache, Request, Scheduler, paged_attention

VOCAB, HEADS, KV_HEADS, DIM = 512, 8, 2, 64
generator = torch.Generator().manual_seed(0)
embedding = torch.randn(VOCAB, HEADS * DIM, generator=generator)
project = torch.randn(HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM, generator=generator) / 23
head = torch.randn(HEADS * DIM, VOCAB, generator=generator)

layer = LayerSpec(kv_format=INT2, num_kv_heads=KV_HEADS, key_dim=DIM, value_dim=DIM)
cache = PagedKVCache([layer], num_blocks=200, dtype=torch.float32)
manager = cache.new_manager(max_num_seqs=8, max_model_len=1024, prefix_caching=True)
scheduler = Scheduler(manager, token_budget=512)


def logits(token_ids: torch.Tensor, step, last: torch.Tensor) -> torch.Tensor:
    """The toy model: embed, attend over everything stored before, score the vocabulary."""
    hidden = embedding[token_ids]
    query, key, value = (
        (hidden @ project).view(len(hidden), -1, DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    )
    attended = paged_attention(query, key, value, cache, 0, step)
    return (hidden + attended.flatten(1))[last] @ head


def main() -> None:
    rng = np.random.default_rng(0)
    common = rng.integers(VOCAB, size=300)
    for name in range(12):
        prompt = np.append(common, rng.integers(VOCAB, size=10))
        scheduler.add(Request(f"request {name}", prompt, max_tokens=20))
    while (scheduled := scheduler.schedule()) is not None:
        step = cache.begin(scheduled.plan)
        last = torch.from_numpy(scheduled.sampled_token_index)
        scores = logits(torch.from_numpy(scheduled.token_ids), step, last)
        for request in scheduler.update(scheduled, scores.argmax(-1).numpy()):
            scheduler.finish(request)
            print(f"{request.request_id}: {request.output_token_ids[:8]} ...")
    statistics = scheduler.statistics()
    print(f"{statistics.num_steps} steps; {statistics.num_hit_tokens} of "
          f"{statistics.num_query_tokens} prompt tokens came from shared blocks; at most "
          f"{manager.pool.peak_allocated} of {manager.num_blocks} blocks in use")  # fmt: skip


if __name__ == "__main__":
    main()
