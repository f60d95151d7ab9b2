"""Groups of layers: blocks held, hits, time a step, beside vLLM's hybrid manager and one group.

    python bench/bench_layer_groups.py --json bench/results/layer_groups.json

Layers form groups as vLLM's manager forms them for these models: of Gemma-3-1b 4 layers each, one
group that keeps all and six that keep 512 tokens (the last two of them have 3 layers, and room for
4); of gpt-oss-20b 12 layers each, one that keeps all, one that keeps 128. vLLM 0.32 or 0.33 takes
part when it can be imported (bench/peers says how), else it is left out. Its blocks are of 16
tokens, as ours are in the native format; int8 and int2 have the geometry of their formats.

*Held* are the blocks of one sequence while it decodes its last token. A block that holds a token of
4 layers is compared with one that holds it of all layers by counting blocks times layers.

*Hits*: both serve the same prompts in the same order, four at once, each in chunks of 2048 tokens
and for 64 tokens more; every prompt begins with one of eight system prompts. Pools are of as many
blocks of 16 tokens on both sides.

*Steps* decode one token of every sequence, all of them longer than every window. All managers take
turns of five steps in one process; `with append` also tells them the tokens, which hashes blocks.
Time is that of the processor: where others want it too, long steps are cut off more often.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from peers import vllm_manager
from report import Row, add_arguments, write_report

from paged_kv import BlockGeometry, BlockManager, LayerSpec, cache_geometry
from paged_kv.benchmarks.manager import Timer, keep_from_collector, random_tokens
from paged_kv.blocks.retention import Retention
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.table_replica import TableReplica
from paged_kv.cache.layer_groups import block_bytes

Windows = tuple[int | None, ...]  # of groups of layers; None where all is seen

CHUNK = 2048  # tokens of a prompt in one step
FORMATS = ("native", "int8", "int2")
LIVING = 4  # sequences at once, of those that hit
DECODED = 16  # steps between two of them
TURN = 5  # steps that count
WARM_UP = 2  # steps before them
ONE_GROUP: Windows = (None,)
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Model:
    """How a model's layers form groups, the one that keeps all first."""

    name: str
    windows: Windows
    group_size: int  # layers of a block
    num_full: int  # layers that see everything
    num_windowed: int
    num_kv_heads: int
    head_size: int

    @property
    def num_layers(self) -> int:
        return self.num_full + self.num_windowed

    def layer(self, kv_format: str) -> LayerSpec:
        return LayerSpec(
            kv_format=kv_format,
            num_kv_heads=self.num_kv_heads,
            key_dim=self.head_size,
            value_dim=self.head_size,
        )

    def least_layer_blocks(self, num_tokens: int) -> float:
        """Blocks of 16 tokens, times layers, that hold what each layer sees and nothing else."""
        window = min(self.windows[-1] or num_tokens, num_tokens)
        return (self.num_full * num_tokens + self.num_windowed * window) / 16


GEMMA = Model(
    name="Gemma-3-1b",
    windows=(None, *[512] * 6),
    group_size=4,
    num_full=4,
    num_windowed=22,
    num_kv_heads=1,
    head_size=256,
)
GPT_OSS = Model(
    name="gpt-oss-20b",
    windows=(None, 128),
    group_size=12,
    num_full=12,
    num_windowed=12,
    num_kv_heads=8,
    head_size=64,
)
MODELS = (GEMMA, GPT_OSS)
SHAPES = {"one group": ONE_GROUP, "two groups": GPT_OSS.windows, "seven groups": GEMMA.windows}


class Sizes(NamedTuple):
    """How much is measured."""

    lengths: tuple[int, ...] = (1024, 8192, 32_768, 131_072)
    pools: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 131_072)
    num_prompts: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)
    num_seqs: int = 1024
    num_rounds: int = 40


QUICK = Sizes((1024, 4096), (8192,), num_prompts=12, seeds=(0,), num_seqs=64, num_rounds=2)


class Ours:
    """A block manager with groups of layers, driven as `ManagerPeer` drives vLLM's."""

    def __init__(
        self,
        geometry: BlockGeometry,
        windows: Windows,
        *,
        num_blocks: int,
        max_num_seqs: int = 1,
        max_model_len: int,
        prefix_caching: bool = True,
    ) -> None:
        self.manager = BlockManager(
            geometry,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
            retentions=tuple(Retention.of_layer(window, None) for window in windows),
        )
        self.replicas = [TableReplica(geometry) for _ in windows]
        self.running: deque[int] = deque()

    def admit(self, token_ids: list[int]) -> int:
        """Compute a prompt in chunks. Returns how many tokens the cache had."""
        manager = self.manager
        seq_id = manager.add_sequence(token_ids)
        num_hit = int(manager.num_computed_tokens[seq_id])
        for start in range(num_hit, len(token_ids), CHUNK):
            self.step(np.array([seq_id]), np.array([min(CHUNK, len(token_ids) - start)]))
        self.running.append(seq_id)
        return num_hit

    def step(self, seq_ids: Any, counts: Any) -> StepPlan:
        plan = self.manager.reserve(seq_ids, counts)
        assert plan is not None, "the pool is full"
        self.manager.commit(plan)
        return plan

    def apply(self, plan: StepPlan) -> None:
        for replica, part in zip(self.replicas, plan.parts, strict=True):
            replica.apply(part)

    def apply_with_arrays(self, plan: StepPlan) -> None:
        for replica, part in zip(self.replicas, plan.parts, strict=True):
            replica.apply(part)
            StepArrays.from_plan(self.manager.geometry, part, replica)

    def decode(self, token_ids: list[int]) -> None:
        seq_ids = np.array(self.running)
        self.manager.append_tokens(seq_ids, np.array(token_ids))
        self.step(seq_ids, np.ones(len(seq_ids), dtype=np.int64))

    def free_first(self) -> None:
        self.manager.remove_sequence(self.running.popleft())


class Theirs:
    """The same of vLLM's manager."""

    def __init__(self, windows: Windows, *, num_blocks: int, max_model_len: int) -> None:
        self.peer = vllm_manager.ManagerPeer(
            0,
            [],
            windows=(*windows[1:], windows[0]),  # in the order in which vLLM meets layers
            chunk=CHUNK,
            num_blocks=num_blocks + 1,  # it keeps one
            max_model_len=max_model_len,
            seed=1,
        )

    def admit(self, token_ids: list[int]) -> int:
        request = self.peer.make_request(token_ids)
        num_hit = self.peer.admit_request(request)
        request.append_output_token_ids(self.peer.tokens(1))
        self.peer.running.append(request)
        return num_hit

    def decode(self, token_ids: list[int]) -> None:
        self.peer.allocate_step()
        self.peer.append_step(token_ids)

    def free_first(self) -> None:
        self.peer.free(self.peer.running.pop(0))


def beside_vllm(case: str, metric: str, unit: str, value: float, theirs: float | None) -> Row:
    """A figure of which less is better."""
    if theirs is None:
        return Row(case=case, metric=metric, value=value, unit=unit)
    return Row(
        case=case,
        metric=metric,
        value=value,
        unit=unit,
        baseline=f"vLLM {vllm_manager.version()}",
        baseline_value=theirs,
        ratio=theirs / value,
    )


# -- blocks held ------------------------------------------------------------------------------


def our_held(geometry: BlockGeometry, windows: Windows, num_tokens: int) -> int:
    ours = Ours(
        geometry,
        windows,
        num_blocks=2 * len(windows) * geometry.table_width(num_tokens),
        max_model_len=num_tokens,
        prefix_caching=False,
    )
    ours.admit([1] * (num_tokens - 1))
    manager, seq_ids = ours.manager, np.array(ours.running)
    manager.append_tokens(seq_ids, [1])
    assert manager.reserve(seq_ids, [1]) is not None
    return manager.pool.num_allocated


def their_held(windows: Windows, num_tokens: int) -> int:
    num_blocks = len(windows) * (num_tokens // 16 + 1)
    theirs = Theirs(windows, num_blocks=num_blocks, max_model_len=num_tokens)
    theirs.admit([1] * (num_tokens - 1))
    theirs.peer.allocate_step()
    return theirs.peer.num_blocks_of(theirs.peer.running[0])


def held_rows(model: Model, num_tokens: int, has_peer: bool) -> list[Row]:
    """Of one sequence; bytes are those of bfloat16, in which vLLM stores every token."""
    case = f"{model.name}, {num_tokens} tokens"
    native = block_bytes([model.layer("native")], torch.bfloat16) * model.group_size
    theirs = their_held(model.windows, num_tokens) if has_peer else None
    all_kept = their_held(ONE_GROUP, num_tokens) * model.num_layers if has_peer else None
    rows = [
        Row(
            case=case,
            metric="layer blocks, by arithmetic",
            value=model.least_layer_blocks(num_tokens),
            unit="blocks x layers",
            baseline="one group that keeps all",
            baseline_value=model.num_layers * num_tokens / 16,
            ratio=model.num_layers * num_tokens / 16 / model.least_layer_blocks(num_tokens),
        )
    ]
    if theirs is not None and all_kept is not None:
        layer_blocks = theirs * model.group_size
        rows.append(
            Row(
                case=case,
                metric="layer blocks, vLLM",
                value=layer_blocks,
                unit="blocks x layers",
                baseline="its one group that keeps all",
                baseline_value=all_kept,
                ratio=all_kept / layer_blocks,
            )
        )
    for name in FORMATS:
        layer = model.layer(name)
        geometry = cache_geometry([layer], torch.bfloat16)
        held = our_held(geometry, model.windows, num_tokens)
        one = our_held(geometry, ONE_GROUP, num_tokens) * model.num_layers
        size = block_bytes([layer], torch.bfloat16) * model.group_size
        rows += [
            Row(
                case=case,
                metric=f"layer blocks, {name}",
                value=held * model.group_size,
                unit="blocks x layers",
                baseline="one group that keeps all",
                baseline_value=one,
                ratio=one / (held * model.group_size),
            ),
            beside_vllm(
                case,
                f"held, {name}",
                "MiB",
                held * size / MIB,
                None if theirs is None else theirs * native / MIB,
            ),
        ]
    return rows


# -- hits -------------------------------------------------------------------------------------


def shared_prompts(num_prompts: int, seed: int) -> list[list[int]]:
    """Of 2000 to 6000 tokens, the first 1000 to 3000 of them one of eight system prompts."""
    rng = np.random.default_rng(seed)
    systems = [random_tokens(rng, length) for length in rng.integers(1000, 3001, size=8)]
    prompts = []
    for length in rng.integers(2000, 6001, size=num_prompts):
        system = systems[rng.integers(8)]
        prompts.append(system + random_tokens(rng, max(int(length) - len(system), 16)))
    return prompts


def hit_rate(side: Ours | Theirs, prompts: Sequence[list[int]]) -> float:
    """Of all prompts' tokens those that need not be computed."""
    num_hit, rng = 0, np.random.default_rng(7)
    for number, prompt in enumerate(prompts):
        if number >= LIVING:
            side.free_first()
        num_hit += side.admit(prompt)
        for _ in range(DECODED):
            side.decode(random_tokens(rng, min(number + 1, LIVING)))
    return num_hit / sum(map(len, prompts))


def hit_rows(model: Model, sizes: Sizes, has_peer: bool) -> list[Row]:
    geometry = cache_geometry([model.layer("native")], torch.bfloat16)
    streams = [shared_prompts(sizes.num_prompts, seed) for seed in sizes.seeds]
    rows = []
    for num_blocks in sizes.pools:
        ours, theirs = [], []
        for prompts in streams:
            shape = {"num_blocks": num_blocks, "max_model_len": 8192}
            side = Ours(geometry, model.windows, max_num_seqs=LIVING, **shape)
            ours.append(hit_rate(side, prompts))
            if has_peer:
                theirs.append(hit_rate(Theirs(model.windows, **shape), prompts))
        value, baseline = float(np.mean(ours)), float(np.mean(theirs)) if theirs else None
        rows.append(
            Row(
                case=f"{model.name}, pool of {num_blocks} blocks",
                metric="hit rate",
                value=value,
                unit="of the tokens",
                baseline=None if baseline is None else f"vLLM {vllm_manager.version()}",
                baseline_value=baseline,
                ratio=None if not baseline else value / baseline,
            )
        )
    return rows


# -- time a step ------------------------------------------------------------------------------


def timed_step(timer: Timer, name: str, *parts: Callable[[], Any]) -> Any:
    """Time a step, and the step with what comes before or after it. Returns what it returned."""
    before, step, after = parts
    start = timer.clock()
    before()
    result = timer(name, step)
    after()
    if timer.is_counting:
        timer.seconds.setdefault(f"{name} with append", []).append(timer.clock() - start)
    return result


def nothing() -> None:
    pass


def running_ours(name: str, windows: Windows, prompts: list[list[int]]) -> Ours:
    geometry = cache_geometry([GPT_OSS.layer(name)], torch.bfloat16)
    ours = Ours(
        geometry,
        windows,
        num_blocks=sum(len(windows) * geometry.max_blocks(len(p) + 1024) for p in prompts),
        max_num_seqs=len(prompts),
        max_model_len=4096,
    )
    for prompt in prompts:
        seq_id = ours.manager.add_sequence(prompt)
        ours.running.append(seq_id)
    counts = np.array([len(prompt) for prompt in prompts])
    ours.apply(ours.step(np.array(ours.running), counts))
    return ours


def running_theirs(windows: Windows, prompts: list[list[int]]) -> Theirs:
    num_blocks = sum(len(windows) * (len(p) // 16 + 64) for p in prompts)
    theirs = Theirs(windows, num_blocks=num_blocks, max_model_len=4096)
    for prompt in prompts:
        theirs.admit(prompt)
    return theirs


def our_turn(timer: Timer, name: str, ours: Ours, tokens: Any) -> None:
    manager, seq_ids = ours.manager, np.array(ours.running)
    seq_ids.setflags(write=False)  # as the scheduler hands them over
    ones = np.ones(len(seq_ids), dtype=np.int64)
    append = partial(manager.append_tokens, seq_ids, tokens)
    step = partial(ours.step, seq_ids, ones)
    for _ in timer.turn(TURN, WARM_UP):
        ours.apply(timed_step(timer, name, append, step, nothing))
    for _ in timer.turn(TURN, WARM_UP):
        append()
        timer(f"{name} arrays", ours.apply_with_arrays, step())


def their_turn(timer: Timer, name: str, theirs: Theirs, tokens: list[int]) -> None:
    peer = theirs.peer
    for _ in timer.turn(TURN, WARM_UP):
        timed_step(timer, name, nothing, peer.allocate_step, partial(peer.append_step, tokens))


def step_rows(sizes: Sizes, has_peer: bool) -> list[Row]:
    """Prompts of 1025 to 2048 tokens: a 16th of the sequences fills a block, and lets one go."""
    peer_name = f"vLLM {vllm_manager.version()}" if has_peer else ""
    rng, timer = np.random.default_rng(5), Timer(peer_name, time.thread_time)
    lens = rng.integers(1025, 2049, size=sizes.num_seqs)
    prompts = [random_tokens(rng, int(length)) for length in lens]
    ours = {
        f"{shape}, {name}": running_ours(name, windows, prompts)
        for shape, windows in SHAPES.items()
        for name in FORMATS[:2]
    }
    theirs = {
        shape: running_theirs(windows, prompts) for shape, windows in SHAPES.items() if has_peer
    }
    keep_from_collector()
    for _ in range(sizes.num_rounds):
        tokens = random_tokens(rng, sizes.num_seqs)
        for name, each in ours.items():
            our_turn(timer, name, each, np.array(tokens, dtype=np.int32))
        for name, peer in theirs.items():
            their_turn(timer, name, peer, tokens)
    rows = []
    for shape in SHAPES:
        case = f"decode step of {sizes.num_seqs}, {shape}"
        for kv_format in FORMATS[:2]:
            name = f"{shape}, {kv_format}"
            rows.append(timer.row(case, f"reserve + commit, {kv_format}", name, shape))
            with_append = (f"{name} with append", f"{shape} with append")
            rows.append(timer.row(case, f"with append, {kv_format}", *with_append))
            rows.append(timer.row(case, f"replica + arrays, {kv_format}", f"{name} arrays", ""))
            if shape != "one group":
                rows += growth_rows(timer, shape, kv_format)
    return rows


def growth_rows(timer: Timer, shape: str, kv_format: str) -> list[Row]:
    """How much longer a step takes than with one group."""
    rows = []
    for what, suffix in (("reserve + commit", ""), ("with append", " with append")):
        one = timer.median(f"one group, {kv_format}{suffix}")
        times, theirs = timer.median(f"{shape}, {kv_format}{suffix}") / one, None
        if shape in timer.seconds:
            theirs = timer.median(f"{shape}{suffix}") / timer.median(f"one group{suffix}")
        metric = f"{what}, {kv_format}"
        rows.append(beside_vllm(f"{shape} to one group", metric, "times", times, theirs))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--no-peer", action="store_true", help="leave vLLM out")
    arguments = parser.parse_args()
    has_peer = vllm_manager.takes_part(is_asked=not arguments.no_peer)
    sizes = QUICK if arguments.quick else Sizes()
    rows = []
    for model in MODELS:
        for num_tokens in sizes.lengths:
            rows += held_rows(model, num_tokens, has_peer)
        rows += hit_rows(model, sizes, has_peer)
    rows += step_rows(sizes, has_peer)
    write_report("layer_groups", rows, arguments.json)


if __name__ == "__main__":
    main()
