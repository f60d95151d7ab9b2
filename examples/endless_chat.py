"""A conversation without end on one windowed sequence: nothing that was said is computed twice.

    python examples/endless_chat.py [turns]

The reader's lines come from a file, the demo model answers; its context is 1024 tokens and the
talk goes far beyond them. Each turn appends only its own tokens. Memory and time for a token stay
what they were: 4 attention sinks (whole blocks of them) and the newest 512 tokens are kept.
"""

import sys
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_kv import INT8, PagedKVCache, SinkWindow
from paged_kv.engine.model_runner import ModelRunner
from paged_kv.entrypoints.demo import MODEL_FOLDER
from paged_kv.models.huggingface import PagedModel

LINES = (
    "And pray, how do you find the country?",
    "I am glad to hear it. Has the captain written?",
    "You must not believe all that is said at Bath.",
    "But what did the old man see upon the water?",
    "Then let us walk, before it begins to rain.",
)
ANSWER_TOKENS = 48

tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
model = PagedModel(AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype="float32"))
cache = PagedKVCache(model.layers(INT8), num_blocks=64, dtype=torch.float32)
runner = ModelRunner(model, cache)
manager = cache.new_manager(max_num_seqs=1, max_model_len=1024)
tokens = manager.chain_tokens([tokenizer.bos_token_id], sink_window=SinkWindow(4, 512))
seq_id = np.array([manager.add_sequence(tokens)])


def compute() -> torch.Tensor:
    """Compute every token that is known; the logits behind the last one."""
    while count := int(manager.num_computable(seq_id)[0]):  # as many as a step may
        plan = manager.reserve(seq_id, [count])
        assert plan is not None
        new = manager.token_ids[seq_id[0], plan.positions].astype(np.int64)
        logits, _ = runner.run(plan, new, np.array([count - 1]))
        manager.commit(plan)
    return logits[0]


def say(text: str) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    manager.append_tokens(seq_id, token_ids, [len(token_ids)])


def answer(generator: torch.Generator) -> str:
    answered: list[int] = []
    while len(answered) < ANSWER_TOKENS:
        weights = (compute() / 0.7).softmax(-1)
        answered.append(int(torch.multinomial(weights, 1, generator=generator)))
        manager.append_tokens(seq_id, answered[-1:])
    return tokenizer.decode(answered)


def main() -> None:
    num_turns = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    generator = torch.Generator().manual_seed(0)
    for turn in range(num_turns):
        line = LINES[turn % len(LINES)]
        say(f'\n"{line}"\n"')
        started = time.perf_counter()
        reply = " ".join(answer(generator).split())
        per_token = (time.perf_counter() - started) / ANSWER_TOKENS
        held = cache.memory_stats(manager).allocated
        print(
            f"[{manager.num_tokens[seq_id[0]]} tokens, {held / 1024:.0f} KiB, "
            f"{1000 * per_token:.1f} ms a token] {line} -- {reply[:60]} ..."
        )
    print(f"at most {manager.pool.peak_allocated} blocks; the model was trained on 1024 tokens")


if __name__ == "__main__":
    main()
