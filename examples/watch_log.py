"""Watch a log without end, and tell of lines that a model did not expect after those before.

    tail -F LOG | python examples/watch_log.py --stdin [--model MODEL]

Each line is computed once, behind the newest 512 tokens. Without --stdin: a made-up ship's log."""

import argparse
import random
import sys
from collections.abc import Iterator
from statistics import mean, stdev

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_kv import DEMO_MODEL, PagedCache, SinkWindow

LINES = ("The wind was from the {}, and the sea was calm.", "We looked to the {}, in silence.")
FAULTS = ("kernel: segfault at 7f3a ip 00ab", "ERROR 404: /var/tmp is full", "zq zq zq {}")


def ships_log() -> Iterator[str]:
    choose = random.Random(0).choice
    for number in range(300):
        line = FAULTS[number // 100] if number % 100 == 70 else choose(LINES)
        yield line.format(choose(("north", "south", "east", "west"))) + "\n"


@torch.inference_mode()
def watch(stdin: bool, model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    llm = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    llm.set_attn_implementation("paged_kv")
    cache = PagedCache(llm, kv_format="int8", sink_window=SinkWindow(4, 512))
    last = llm(torch.tensor([[tokenizer.bos_token_id]]), past_key_values=cache).logits[0]
    usual: list[float] = []
    for number, line in enumerate(sys.stdin if stdin else ships_log(), start=1):
        token_ids = torch.tensor(tokenizer.encode(line, add_special_tokens=False)[:200])
        logits = llm(token_ids[None], past_key_values=cache).logits[0]
        before, last = torch.cat([last, logits[:-1]]), logits[-1:]
        nats = torch.nn.functional.cross_entropy(before, token_ids).item()
        if len(usual) > 20 and nats > mean(usual) + 5 * stdev(usual):
            print(f"line {number}: {nats:.1f} nats a token, not {mean(usual):.1f}: {line.strip()}")
        usual = [*usual[-49:], nats]
        held, length = cache.memory_stats().allocated, cache.get_seq_length()
        if number % 100 == 0:
            print(f"[{number} lines, {length} tokens; {held} bytes held]")
        if length > 1_000_000:  # where positions in float32 begin to be coarse
            cache.reset()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stdin", action="store_true", help="watch standard input")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or hub name (the demo model)")
    try:
        watch(**vars(parser.parse_args()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"watch_log.py: {str(error).splitlines()[0]}") from error
