"""A conversation without end on one stream: nothing that was said is computed twice.

    python examples/endless_chat.py [turns]

The reader's lines are below, the demo model answers; its context is 1024 tokens and the talk goes
far beyond them. Each turn computes only its own tokens. Memory and time for a token stay what they
were: 4 attention sinks (whole blocks of them) and the newest 512 tokens are kept.
"""

import argparse
import time

from paged_kv import DEMO_MODEL, LLM, SamplingParams, SinkWindow

LINES = (
    "And pray, how do you find the country?",
    "I am glad to hear it. Has the captain written?",
    "You must not believe all that is said at Bath.",
    "But what did the old man see upon the water?",
    "Then let us walk, before it begins to rain.",
)
ANSWER_TOKENS = 48


def main(num_turns: int) -> None:
    most = 0
    with LLM(DEMO_MODEL, max_num_seqs=1) as llm, llm.open_stream(SinkWindow(4, 512)) as stream:
        for turn in range(num_turns):
            line = LINES[turn % len(LINES)]
            stream.feed(f'\n"{line}"\n"')
            started = time.perf_counter()
            answer = stream.generate(
                SamplingParams(
                    temperature=0.7, seed=turn, max_tokens=ANSWER_TOKENS, ignore_eos=True
                )
            )
            per_token = (time.perf_counter() - started) / ANSWER_TOKENS
            held = stream.memory_stats().allocated
            most = max(most, held)
            print(
                f"[{stream.num_tokens} tokens, {held / 1024:.0f} KiB, {1000 * per_token:.1f} ms a "
                f"token] {line} -- {' '.join(answer.text.split())[:60]} ..."
            )
    print(f"at most {most / 1024:.0f} KiB; the model was trained on 1024 tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("turns", nargs="?", type=int, default=40, help="how many (40)")
    main(parser.parse_args().turns)
