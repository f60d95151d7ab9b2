"""A conversation without end on one windowed sequence: nothing that was said is computed twice.

    python examples/endless_chat.py [turns]

The reader's lines are below, the demo model answers; its context is 1024 tokens and the talk goes
far beyond them. Each turn computes only its own tokens. Memory and time for a token stay what they
were: 4 attention sinks (whole blocks of them) and the newest 512 tokens are kept.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_kv import DEMO_MODEL, PagedCache, SinkWindow

LINES = (
    "And pray, how do you find the country?",
    "I am glad to hear it. Has the captain written?",
    "You must not believe all that is said at Bath.",
    "But what did the old man see upon the water?",
    "Then let us walk, before it begins to rain.",
)
ANSWER_TOKENS = 48


@torch.inference_mode()
def main(num_turns: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32")
    model.set_attn_implementation("paged_kv")
    cache = PagedCache(model, kv_format="int8", sink_window=SinkWindow(4, 512))
    generator, most = torch.Generator().manual_seed(0), 0
    unread = [tokenizer.bos_token_id]  # tokens that the model has not seen
    for turn in range(num_turns):
        line, answered = LINES[turn % len(LINES)], []
        unread += tokenizer.encode(f'\n"{line}"\n"', add_special_tokens=False)
        started = time.perf_counter()
        for _ in range(ANSWER_TOKENS):
            logits = model(torch.tensor([unread]), past_key_values=cache).logits[0, -1]
            unread = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator).tolist()
            answered += unread
        per_token = (time.perf_counter() - started) / ANSWER_TOKENS
        held = cache.memory_stats().allocated
        most = max(most, held)
        print(
            f"[{cache.get_seq_length()} tokens, {held / 1024:.0f} KiB, {1000 * per_token:.1f} ms "
            f"a token] {line} -- {' '.join(tokenizer.decode(answered).split())[:60]} ..."
        )
    print(f"at most {most / 1024:.0f} KiB; the model was trained on 1024 tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("turns", nargs="?", type=int, default=40, help="how many (40)")
    main(parser.parse_args().turns)
