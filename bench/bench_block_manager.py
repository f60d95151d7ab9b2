"""The block manager and the scheduler beside vLLM's, in one process, call by call in turn.

    python bench/bench_block_manager.py --json bench/results/block_manager.json

vLLM 0.33.0 takes part when its python files are importable (bench/peers says how), else it is left
out and the report says so. Both sides serve the same lengths; every request decodes one token a
step. Ours runs int8's geometry (blocks of 128 tokens, open blocks of 64) with prefix
caching; int2 and native beside it. vLLM runs blocks of 16 tokens with prefix caching, its defaults.

What the peer's step covers and ours does not: vLLM's schedule() also builds the lists for its model
runner (a request's id, new block ids and counts, each as python objects) and asks its encoder,
connector and grammar parts, off here, for each request; its update makes one output object for
each request and tests for stop tokens. Ours returns arrays; stop tokens are the engine's part,
and only requests at their token limit become python objects. What ours covers and the peer's
manager does not: vLLM makes slot mappings in its model runner; `with index arrays` adds ours.

The two sides take turns of twenty calls, with five before them that are not counted. Rows with
`cold caches` read 64 MB of other memory before each step, on both sides: between the steps of a
real engine a model runs. Objects that live already are kept from the garbage collector, as vLLM's
engine does.
"""

from __future__ import annotations

import argparse

from peers import vllm_manager
from report import add_arguments, write_report

from paged_kv.benchmarks.manager import manager_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--no-peer", action="store_true", help="leave vLLM out")
    arguments = parser.parse_args()
    has_peer = vllm_manager.takes_part(is_asked=not arguments.no_peer)
    rows = manager_rows(arguments.quick, vllm_manager if has_peer else None)
    write_report("block_manager", rows, arguments.json)


if __name__ == "__main__":
    main()
