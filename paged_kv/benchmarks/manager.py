"""The block manager and the scheduler, call by call, beside a peer's in turn where there is one.

Knows calls and their times; never what a peer is. `bench/bench_block_manager.py` says what is
measured, and brings vLLM's.

Long because each table is one function: what is set up, then timed in turn, then told.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from paged_kv.scheduler.request import Request
from paged_kv.scheduler.scheduler import Scheduler

from ..blocks.block_manager import BlockManager
from ..blocks.geometry import BlockGeometry
from ..blocks.step_arrays import StepArrays
from ..blocks.step_plan import StepPlan
from ..blocks.table_replica import TableReplica
from .report import Row

GEOMETRIES = {
    "int8": (128, 64, 64, 0),
    "int2": (128, 16, 16, 32),
    "native": (16, 16, 0, 0),
}
MAX_MODEL_LEN = 4096
VOCAB_SIZE = 32_000
PROMPT = 1024  # tokens of an admission
ADMITTED = 64  # prompts in one step
TURN = 20  # calls that count
WARM_UP = 5  # calls before them
OTHER_MEMORY = np.zeros(1 << 23)
Peers = Any  # a module such as bench/peers/vllm_manager.py, or None


def geometry(name: str) -> BlockGeometry:
    block_size, open_block_size, num_head_tokens, min_tail_tokens = GEOMETRIES[name]
    return BlockGeometry(
        block_size=block_size,
        open_block_size=open_block_size,
        num_head_tokens=num_head_tokens,
        min_tail_tokens=min_tail_tokens,
    )


def new_manager(
    name: str, num_seqs: int, lens: list[int], *, prefix_caching: bool = True
) -> BlockManager:
    shape = geometry(name)
    num_blocks = sum(shape.max_blocks(length + 256) for length in lens)
    num_blocks += ADMITTED * shape.max_blocks(PROMPT + 1) + 100
    return BlockManager(
        shape,
        num_blocks=num_blocks,
        max_num_seqs=num_seqs + ADMITTED,
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=prefix_caching,
    )


class Timer:
    """Seconds of each call, by name; medians leave out what disturbs a shared machine."""

    def __init__(self, peer_name: str = "", clock: Callable[[], float] = time.perf_counter) -> None:
        self.peer_name: str = peer_name
        self.clock: Callable[[], float] = clock
        self.seconds: dict[str, list[float]] = {}
        self.is_counting: bool = True

    def __call__(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        start = self.clock()
        result = function(*arguments)
        seconds = self.clock() - start
        if self.is_counting:
            self.seconds.setdefault(name, []).append(seconds)
        return result

    def turn(self, num_calls: int = TURN, num_before: int = WARM_UP) -> Iterator[None]:
        """So many calls that count, after some that do not."""
        for index in range(-num_before, num_calls):
            self.is_counting = index >= 0
            yield
        self.is_counting = True

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def row(self, case: str, metric: str, name: str, peer: str, divisor: int = 1) -> Row:
        """One of our figures in microseconds beside the peer's, if it took part."""
        value = self.median(name) * 1e6 / divisor
        if peer not in self.seconds:
            return Row(case=case, metric=metric, value=value, unit="us")
        baseline = self.median(peer) * 1e6
        return Row(
            case=case,
            metric=metric,
            value=value,
            unit="us",
            baseline=self.peer_name,
            baseline_value=baseline,
            ratio=baseline / value,
        )


def timer_beside(peers: Peers) -> Timer:
    return Timer(f"vLLM {peers.version()}" if peers else "")


def keep_from_collector() -> None:
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def read_other_memory(is_wanted: bool) -> None:
    """Push what both sides work on out of the processor's caches."""
    if is_wanted:
        OTHER_MEMORY.sum()


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return list(map(int, rng.integers(VOCAB_SIZE, size=count)))


def lengths(num_seqs: int) -> list[int]:
    """Prompts of 1 to 1024 tokens: blocks fill at every step, for a part of the sequences."""
    return list(map(int, np.random.default_rng(0).integers(1, 1025, size=num_seqs)))


def peer_shape(lens: list[int], *, enable_caching: bool = True) -> dict[str, Any]:
    num_blocks = sum(length // 16 + 16 for length in lens) + 10_000
    return {
        "num_blocks": num_blocks,
        "max_model_len": MAX_MODEL_LEN,
        "enable_caching": enable_caching,
        "seed": 1,
    }


def decode_rows(num_seqs: int, num_steps: int, peers: Peers) -> list[Row]:
    """One token for every running sequence: the manager alone."""
    lens = lengths(num_seqs)
    peer: Any = peers.ManagerPeer(num_seqs, lens, **peer_shape(lens)) if peers else None
    rng = np.random.default_rng(2)
    managers = {}
    replicas = {name: TableReplica(geometry(name)) for name in GEOMETRIES}
    seq_ids = rng.permutation(num_seqs)
    seq_ids.setflags(write=False)  # as the scheduler hands them over
    for name in GEOMETRIES:
        managers[name] = manager = new_manager(name, num_seqs, lens)
        for length in lens:
            manager.add_sequence(random_tokens(rng, length))
        plan = manager.reserve(seq_ids, np.array(lens)[seq_ids])
        assert plan is not None
        replicas[name].apply(plan)
        manager.commit(plan)
    ones = np.ones(num_seqs, dtype=np.int64)
    timer = timer_beside(peers)

    def step(name: str) -> StepPlan:
        plan = managers[name].reserve(seq_ids, ones)
        assert plan is not None
        managers[name].commit(plan)
        return plan

    def step_with_arrays(name: str) -> StepPlan:
        plan = step(name)
        replicas[name].apply(plan)
        StepArrays.from_plan(managers[name].geometry, plan, replicas[name])
        return plan

    def append(manager: BlockManager) -> None:
        manager.append_tokens(seq_ids, rng.integers(VOCAB_SIZE, size=num_seqs))

    keep_from_collector()
    for _ in range(num_steps // TURN):
        for is_cold in (False, True):
            suffix = " cold" if is_cold else ""
            for _ in timer.turn() if peer is not None else ():
                read_other_memory(is_cold)
                timer(f"peer{suffix}", peer.allocate_step)
                peer.append_step()
            for _ in timer.turn():
                append(managers["int8"])
                read_other_memory(is_cold)
                replicas["int8"].apply(timer(f"int8{suffix}", step, "int8"))
        for name, manager in managers.items():
            for _ in timer.turn() if name != "int8" else ():
                append(manager)
                replicas[name].apply(timer(name, step, name))
            for _ in timer.turn():
                append(manager)
                timer(f"{name} arrays", step_with_arrays, name)
    case = f"decode step of {num_seqs} sequences"
    rows = []
    for name in GEOMETRIES:
        rows.append(timer.row(case, f"manager, {name}", name, "peer"))
        rows.append(timer.row(case, f"with index arrays, {name}", f"{name} arrays", "peer"))
    rows.append(timer.row(case, "manager, int8, cold caches", "int8 cold", "peer cold"))
    return rows


def scheduler_rows(num_seqs: int, num_steps: int, peers: Peers) -> list[Row]:
    """schedule + update of a decode step; then preempting and aborting one request."""
    lens = lengths(num_seqs)
    peer: Any = None
    if peers:
        budget = max(num_seqs, 8192)
        peer = peers.SchedulerPeer(num_seqs, lens, token_budget=budget, **peer_shape(lens))
    rng = np.random.default_rng(3)
    scheduler = Scheduler(new_manager("int8", num_seqs, lens), token_budget=sum(lens))
    requests = [
        Request(f"request {i}", random_tokens(rng, length), max_tokens=2000)
        for i, length in enumerate(lens)
    ]
    for request in requests:
        scheduler.add(request)
    timer = timer_beside(peers)

    def update(step: Any, tokens: Any) -> None:
        scheduler.update(step, tokens)

    def our_step(suffix: str) -> None:
        step = timer(f"schedule{suffix}", scheduler.schedule)
        assert step is not None
        timer(f"update{suffix}", update, step, rng.integers(VOCAB_SIZE, size=num_seqs))

    def peer_step(suffix: str) -> None:
        output = timer(f"peer schedule{suffix}", peer.schedule)
        timer(f"peer update{suffix}", peer.update, output, peer.sample(output))

    our_step(" of the prefill")
    assert scheduler.num_running == num_seqs
    keep_from_collector()
    for _ in range(num_steps // TURN):
        for is_cold in (False, True):
            suffix = " cold" if is_cold else ""
            for _ in timer.turn() if peer is not None else ():
                read_other_memory(is_cold)
                peer_step(suffix)
            for _ in timer.turn():
                read_other_memory(is_cold)
                our_step(suffix)
    for suffix in ("", " cold"):
        for name in ("", "peer ") if peer is not None else ("",):
            both = zip(
                timer.seconds[f"{name}schedule{suffix}"],
                timer.seconds[f"{name}update{suffix}"],
                strict=True,
            )
            timer.seconds[f"{name}both{suffix}"] = [sum(pair) for pair in both]
    for _ in range(min(num_seqs // 4, 50)):
        timer(
            "preempt",
            scheduler._preempt,
            scheduler._running.by_seq_id[scheduler._running.seq_ids[-1]],
        )
        if peer is not None:
            timer("peer preempt", peer.preempt)
    for request in requests[: min(num_seqs // 4, 50)]:
        timer("abort", scheduler.abort, request.request_id)
    if peer is not None:
        for index in range(min(num_seqs // 4, 50)):
            timer("peer abort", peer.abort, str(index + 1))
    case = f"{num_seqs} running requests"
    return [
        timer.row(case, "schedule + update", "both", "peer both"),
        timer.row(case, "schedule + update, cold caches", "both cold", "peer both cold"),
        timer.row(case, "schedule", "schedule", "peer schedule"),
        timer.row(case, "preempt by recompute, one", "preempt", "peer preempt"),
        timer.row(case, "abort, one", "abort", "peer abort"),
    ]


def admission_rows(num_rounds: int, peers: Peers) -> list[Row]:
    """Admission of prompts of 1024 tokens: hash, look up, take blocks, publish; then free, fork.

    `in a batch` is a 64th of a step that admits 64 prompts, `alone` a step that admits one. vLLM
    admits one after the other in either case.
    """
    rows = []
    for mode in ("miss", "hit", "off"):
        caching = mode != "off"
        lens = [1] * ADMITTED
        peer: Any = None
        if peers:
            shape = peer_shape([PROMPT] * 2 * ADMITTED, enable_caching=caching)
            peer = peers.ManagerPeer(0, [], **shape)
        manager = new_manager("int8", ADMITTED, lens, prefix_caching=caching)
        rng = np.random.default_rng(4)
        timer = timer_beside(peers)
        prompts = new_prompts(rng)
        fork_and_free(manager, admit(manager, prompts), timer)  # what a hit finds
        timer.seconds.clear()
        keep_from_collector()
        for _ in range(num_rounds):
            for _ in timer.turn(5):
                seq_ids = timer(
                    "batch", admit, manager, prompts if mode == "hit" else new_prompts(rng)
                )
                fork_and_free(manager, seq_ids, timer)
            for prompt in (prompts if mode == "hit" else new_prompts(rng))[:TURN]:
                manager.remove_sequence(timer("alone", admit, manager, [prompt])[0])
            if peer is not None:
                for _ in timer.turn(1):
                    for prompt in prompts if mode == "hit" else new_prompts(rng):
                        request = timer("peer", peer.admit, prompt)
                        timer("peer free", peer.free, request)
        case = f"prompt of {PROMPT} tokens, prefix cache {mode}"
        rows.append(timer.row(case, "admission, in a batch", "batch", "peer", ADMITTED))
        rows.append(timer.row(case, "admission, alone", "alone", "peer"))
        rows.append(timer.row(case, "free", "free", "peer free"))
        rows.append(timer.row(case, "fork", "fork", ""))
    return rows


def new_prompts(rng: np.random.Generator) -> list[list[int]]:
    return [random_tokens(rng, PROMPT) for _ in range(ADMITTED)]


def admit(manager: BlockManager, prompts: list[list[int]]) -> list[int]:
    """What makes requests of token lists run: hash, look up, reserve, and publish their blocks."""
    seq_ids = [manager.add_sequence(prompt) for prompt in prompts]
    remaining = manager.num_tokens[seq_ids] - manager.num_computed_tokens[seq_ids]
    plan = manager.reserve(seq_ids, remaining)
    assert plan is not None
    manager.commit(plan)
    return seq_ids


def fork_and_free(manager: BlockManager, seq_ids: list[int], timer: Timer) -> None:
    for seq_id in seq_ids:
        manager.remove_sequence(timer("fork", manager.fork, seq_id))
    for seq_id in seq_ids:
        timer("free", manager.remove_sequence, seq_id)


def memory_rows() -> list[Row]:
    """A pool of a million blocks, and what a sequence of up to 4096 tokens costs."""
    num_blocks, num_seqs = 1_000_000, 1024
    timer = Timer()
    for _ in range(5):
        manager = timer("build", build_pool, num_blocks, num_seqs)
    pool, cache = manager.pool, manager.prefix_cache
    arrays = [value for part in (pool, cache) for value in vars(part).values()]
    by_id = {id(array): array.nbytes for array in arrays if isinstance(array, np.ndarray)}
    tables = [*vars(manager.tables).values(), *vars(manager.sequences).values()]
    by_seq_id = {
        id(array): array.nbytes
        for array in tables
        if isinstance(array, np.ndarray) and len(array) == num_seqs
    }
    case = "pool of 1,000,000 blocks"
    return [
        Row(case=case, metric="build", value=timer.median("build") * 1e3, unit="ms"),
        Row(case=case, metric="bytes a block", value=sum(by_id.values()) / num_blocks, unit="B"),
        Row(
            case="sequence of up to 4096 tokens, int8",
            metric="bytes of tables and tokens",
            value=sum(by_seq_id.values()) / num_seqs,
            unit="B",
        ),
    ]


def build_pool(num_blocks: int, num_seqs: int) -> BlockManager:
    return BlockManager(
        geometry("int8"),
        num_blocks=num_blocks,
        max_num_seqs=num_seqs,
        max_model_len=MAX_MODEL_LEN,
        prefix_caching=True,
    )


def growth_row(rows: list[Row], few: int, many: int) -> Row:
    """How much longer a whole step takes with more sequences."""
    by_case = {row.case: row.value for row in rows if row.metric == "schedule + update"}
    times = by_case[f"{many} running requests"] / by_case[f"{few} running requests"]
    return Row(
        case=f"{few} to {many} running requests",
        metric="growth of schedule + update",
        value=times,
        unit="times",
    )


def manager_rows(
    is_quick: bool, peers: Peers = None, advance: Callable[[], None] = lambda: None
) -> list[Row]:
    """Everything; `advance` is called as often as there are `sizes`, and once more."""
    sizes = sizes_of(is_quick)
    rows = admission_rows(2 if is_quick else 8, peers)
    advance()
    for num_seqs in sizes:
        num_steps = TURN if is_quick else 3 * TURN
        rows += decode_rows(num_seqs, num_steps, peers)
        rows += scheduler_rows(num_seqs, num_steps, peers)
        advance()
    rows.append(growth_row(rows, 1024 if len(sizes) > 2 else sizes[0], sizes[-1]))
    return rows + memory_rows()


def sizes_of(is_quick: bool) -> tuple[int, ...]:
    """Numbers of sequences."""
    return (256, 1024) if is_quick else (256, 1024, 4096, 16384)
