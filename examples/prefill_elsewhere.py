"""Prefill in one process, decode in another: the prompt's blocks go between them as bytes.

    python examples/prefill_elsewhere.py [--format int2] [--model MODEL] [PROMPT]

The second process computes the prompt and its first token; this one goes on from the bytes that it
gets, and prints what moved, the text, and whether it is the one that it writes all by itself.
"""

import argparse
from multiprocessing import get_context

from paged_kv import DEMO_MODEL, LLM, PrefilledPrompt, SamplingParams

PROMPT = (
    "The captain stood upon the deck and looked out over the sea, where no land was seen. " * 12
)
PARAMS = SamplingParams(max_tokens=40, temperature=0.8, seed=3)  # the same on both sides


def new_llm(model: str, kv_format: str) -> LLM:
    return LLM(model, kv_format=kv_format, prefix_caching=False)


def prefill(model: str, kv_format: str, connection) -> None:
    """The other process: a prompt comes, its blocks go."""
    with new_llm(model, kv_format) as llm:
        connection.send_bytes(llm.prefill(connection.recv(), PARAMS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--format", default="int2", help="of the blocks in both processes (int2)")
    parser.add_argument("--model", default=DEMO_MODEL, help="folder or hub name (the demo model)")
    asked = parser.parse_args()
    context = get_context("spawn")
    connection, other = context.Pipe()
    process = context.Process(target=prefill, args=(asked.model, asked.format, other))
    process.start()
    other.close()  # so that a process that fails is an end here, not a wait
    with new_llm(asked.model, asked.format) as llm:
        connection.send(asked.prompt)
        prompt = PrefilledPrompt(connection.recv_bytes())
        process.join()
        num_tokens = len(prompt.prompt_token_ids)
        print(f"{num_tokens} tokens came as {len(prompt.data) / num_tokens:.0f} bytes each")
        (output,) = llm.generate(prompt, PARAMS)
        print(output.text)
        (alone,) = llm.generate(asked.prompt, PARAMS)
        print("the same as alone:", alone.token_ids == output.token_ids)


if __name__ == "__main__":
    main()
