"""docs/blocks.md and docs/kernels.md are true: the library answers what they say and show.

The pages' tables are read from the pages, what is drawn from `docs/pictures`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from inspect import signature
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch

from paged_kv import FORMATS, INT4, BlockGeometry, BlockManager, LayerSpec, Request, Scheduler
from paged_kv.blocks.block_tables import BlockTables
from paged_kv.blocks.retention import KEEPS_ALL, Retention
from paged_kv.blocks.sink_window import SinkWindow
from paged_kv.blocks.step_arrays import StepArrays
from paged_kv.blocks.step_plan import StepPlan
from paged_kv.blocks.table_replica import TableReplica
from paged_kv.cache.kv_cache import PagedKVCache
from paged_kv.cache.layer_spec import cache_geometry
from paged_kv.kernels.eager.quantize import (
    dequantize_symmetric,
    pack_planes,
    quantize_centred,
    quantize_keys,
    read_codes,
)
from paged_kv.kernels.eager.rotation import rotate
from paged_kv.kernels.naive import weigh
from paged_kv.kernels.rules import ScoreRules
from paged_kv.scheduler.admission import MAX_TIMES_PASSED
from paged_kv.scheduler.request import AGING_STEPS

ROOT = Path(__file__).parent.parent
DOCS, PICTURES = ROOT / "docs", ROOT / "docs" / "pictures"
sys.path.append(str(PICTURES))

import draw  # noqa: E402
import draw_blocks as blocks  # noqa: E402
import draw_kernels as kernels  # noqa: E402
from drawing import WIDTH  # noqa: E402

PAGES = {name: (DOCS / f"{name}.md").read_text() for name in ("blocks", "kernels")}
GEOMETRY = BlockGeometry(block_size=8, open_block_size=2, num_head_tokens=2, min_tail_tokens=2)
PROMPT = np.arange(100, 121)


def table(page: str, header: str) -> list[list[str]]:
    """The rows of the table whose first row begins so."""
    lines = PAGES[page].splitlines()
    [start] = [n for n, line in enumerate(lines) if line.startswith(f"| {header}")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
    return rows


def words(ids: Sequence[int] | np.ndarray) -> str:
    return " ".join(str(int(block_id)) for block_id in ids)


def held(manager: BlockManager, seq_id: int, tables: BlockTables | None = None) -> blocks.Held:
    """A sequence as it is drawn."""
    tables = manager.tables if tables is None else tables
    head_and_tail, num_head = tables.head_and_tail_ids(seq_id).tolist(), GEOMETRY.num_head_blocks
    lengths = tables.lengths(seq_id)
    return blocks.Held(
        lengths.num_stored,
        tuple(head_and_tail[:num_head]),
        tuple(tables.body_ids(seq_id).tolist()),
        tuple(head_and_tail[num_head:]),
        manager.num_free_blocks,
        lengths.num_evicted,
    )


def make_manager(**options: object) -> BlockManager:
    settings = {"num_blocks": blocks.NUM_BLOCKS, "max_num_seqs": 4, "max_model_len": 64}
    return BlockManager(GEOMETRY, **(settings | options))  # type: ignore[arg-type]


def compute(manager: BlockManager, seq_ids: Sequence[int], counts: Sequence[int]) -> StepPlan:
    plan = manager.reserve(np.array(seq_ids), np.array(counts))
    assert plan is not None
    manager.commit(plan)
    return plan


def columns(its: blocks.Held) -> list[str]:
    return [words(its.head), words(its.body), words(its.tail)]


# -- drawings -------------------------------------------------------------------------------------


def test_pictures_are_what_the_script_draws() -> None:
    drawn = {path.stem for page in PAGES for path in PICTURES.glob(f"{page}-*.svg")}
    assert drawn == set(draw.PICTURES)
    for name, picture in draw.PICTURES.items():
        text = (PICTURES / f"{name}.svg").read_text(encoding="utf-8")
        assert text == picture().svg(), f"{name}: make drawings"


@pytest.mark.parametrize("name", draw.PICTURES)
def test_nothing_that_is_written_leaves_its_picture(name: str) -> None:
    for start, end, text in draw.PICTURES[name]().texts:
        assert start > 6, text
        assert end < WIDTH - 6, text


def test_every_picture_is_shown_and_said_in_words() -> None:
    for page, text in PAGES.items():
        shown = re.findall(r"!\[([^\]]*)\]\(pictures/([\w-]+)\.svg\)", text)
        assert [name for _, name in shown] == [n for n in draw.PICTURES if n.startswith(page)]
        assert all(len(words.split()) > 20 for words, _ in shown)


@pytest.mark.parametrize("page", PAGES)
def test_what_a_section_names_is_there(page: str) -> None:
    """Files behind `In`, and functions in parentheses behind their file."""
    sections = re.findall(r"^In (`.*?)(?:\n\n|\Z)", PAGES[page], re.DOTALL | re.MULTILINE)
    assert len(sections) == PAGES[page].count("\n## ")
    for section in sections:
        folder, text = ROOT, ""
        for name in re.findall(r"`([^`]+)`", section):
            if name.endswith("/"):
                folder = ROOT / name
            elif name.endswith(".py"):
                path = ROOT / name if "/" in name else folder / name
                folder, text = path.parent, path.read_text()
            else:
                assert re.search(rf"\b{name}\b", text), f"{path} has no {name}"


# -- blocks ---------------------------------------------------------------------------------------


def test_formats_have_the_blocks_that_the_page_says() -> None:
    rows = table("blocks", "format")
    assert [name for name, *_ in rows] == list(FORMATS)
    for name, *numbers in rows:
        layer = LayerSpec(kv_format=FORMATS[name], num_kv_heads=1, key_dim=128, value_dim=128)
        geometry = cache_geometry([layer], torch.bfloat16)
        sealed = str(geometry.block_size) if geometry.seals else "never sealed"
        sizes = geometry.open_block_size, geometry.num_head_tokens, geometry.min_tail_tokens
        record_bytes = layer.record_layout(torch.bfloat16).record_bytes
        assert numbers == [sealed, *(str(size) for size in (*sizes, record_bytes))]
    sizes = cache_geometry([int4_layer()], torch.bfloat16).sizes // 16
    assert sizes[[0, 1, 4]].tolist() == GEOMETRY.sizes[[0, 1, 4]].tolist()


def test_the_example_runs() -> None:
    [example] = re.findall(r"```python\n(.*?)```", PAGES["blocks"], re.DOTALL)
    output = StringIO()
    with redirect_stdout(output):
        exec(example, {})
    assert example.rstrip().endswith(f"# {output.getvalue().strip()}")


def grow_a(manager: BlockManager) -> tuple[int, list[blocks.Held], list[StepPlan]]:
    """Sequence A: a prompt of 9 tokens, then one a step."""
    seq_id = manager.add_sequence(PROMPT[:9])
    plans = [compute(manager, [seq_id], [9])]
    states = [held(manager, seq_id)]
    for its in blocks.GROWTH[1:]:
        manager.append_tokens([seq_id], PROMPT[its.num_tokens - 1 : its.num_tokens])
        plans.append(compute(manager, [seq_id], [1]))
        states.append(held(manager, seq_id))
    return seq_id, states, plans


def test_a_grows_as_its_table_says() -> None:
    _, states, plans = grow_a(make_manager(prefix_caching=True))
    assert tuple(states) == blocks.GROWTH
    assert table("blocks", "tokens of A") == [
        [
            str(its.num_tokens),
            *columns(its),
            words(plan.new_block_ids),
            words(plan.freed_block_ids),
            str(its.num_free),
        ]
        for its, plan in zip(states, plans, strict=True)
    ]
    sealing = plans[3]  # the plan that is drawn
    assert sealing.new_block_ids.tolist() == sealing.seal_block_ids.tolist() == [6]
    assert sealing.block_counts.tolist() == [[1, 0, 4, 0]]
    assert sealing.freed_block_ids.tolist() == [1, 2, 3, 4]
    assert [len(plan.changed_rows) for plan in plans] == [1, 0, 1, 1, 1]


def test_prefixes_forks_and_idle_blocks_are_as_drawn() -> None:
    manager = make_manager(prefix_caching=True)
    a, _, _ = grow_a(manager)
    b = manager.add_sequence(np.append(PROMPT[:10], np.arange(11)))
    assert held(manager, b) == blocks.SHARED[0]
    compute(manager, [b], [11])
    assert held(manager, b) == blocks.SHARED[1]
    places = manager.tables.ids[b][: GEOMETRY.table_width(21)].tolist()
    drawn = blocks.table_of(blocks.SHARED[1])
    assert len(drawn) == len(places)
    for entry, place in zip(drawn, places, strict=True):
        assert entry in (None, place)

    own = manager.token_ids[b, :18].tolist()
    for length, found, _ in table("blocks", "tokens of the prompt"):
        prompt = own + [7] * (int(length) - 18)
        assert manager.find_prefix(manager.chain_tokens(prompt)).num_tokens == int(found)

    f = manager.fork(b)
    manager.append_tokens([b, f], [5, 6])
    plan = compute(manager, [b, f], [1, 1])
    assert (plan.copy_sources.tolist(), plan.copy_targets.tolist()) == ([4], [7])
    assert (held(manager, b), held(manager, f)) == blocks.FORKED
    rows = [[name, *columns(held(manager, n))] for name, n in (("B", b), ("F", f))]
    assert table("blocks", "in the step of token 21") == rows

    for seq_id in (a, b, f):
        manager.remove_sequence(seq_id)
    taken = manager.pool.allocate(manager.num_blocks)  # what nobody can find, then idle ones
    assert tuple(taken[-3:].tolist()) == blocks.IDLE


def test_groups_let_go_as_their_table_says() -> None:
    manager = make_manager(num_blocks=32, retentions=(KEEPS_ALL, Retention(window_size=8)))
    seq_id = manager.add_sequence(PROMPT[:1])
    compute(manager, [seq_id], [1])
    for _ in range(27):
        manager.append_tokens([seq_id], [3])
        compute(manager, [seq_id], [1])
    states = tuple(held(manager, seq_id, tables) for tables in manager.groups)
    assert states == blocks.GROUPS
    rows = [[*columns(its), str(its.num_evicted)] for its in states]
    assert [row[1:] for row in table("blocks", "at 28 tokens")] == rows


def test_a_stream_lets_go_as_its_table_says() -> None:
    manager = make_manager(num_blocks=200)
    chain = manager.chain_tokens(PROMPT[:1], sink_window=SinkWindow(2, 8))
    seq_id, rows, states = manager.add_sequence(chain), [], []
    compute(manager, [seq_id], [1])
    for num_tokens in range(2, 18):
        manager.append_tokens([seq_id], [3])
        compute(manager, [seq_id], [1])
        its = held(manager, seq_id)
        if num_tokens >= 16:
            states.append(its._replace(num_free=0))
            numbers = str(its.num_tokens), str(its.num_evicted)
            rows.append([str(num_tokens), *columns(its), *numbers])
    assert table("blocks", "tokens so far") == rows
    assert tuple(states) == blocks.STREAM
    manager.append_tokens([seq_id], [3])
    plan = manager.reserve([seq_id], [1])
    assert plan is not None
    assert plan.positions.tolist() == [17]
    assert plan.head_shifts is not None
    assert plan.head_shifts.tolist() == [8]


def test_steps_of_the_scheduler_are_as_their_table_says() -> None:
    manager = make_manager(num_blocks=24, max_num_seqs=8, num_host_blocks=8)
    scheduler = Scheduler(
        manager, token_budget=16, max_prefill_tokens=8, steps_ahead=8, watermark=0
    )
    outputs = {"A": 12, "B": 20, "C": 10, "D": 10, "E": 4}
    requests = {
        name: Request(name, 100 * number + np.arange(length), max_tokens=outputs[name])
        for number, (name, length) in enumerate(blocks.PROMPTS.items())
    }
    rows = []
    for number, counts in enumerate(blocks.STEPS, start=1):
        for name in {1: "AB", 3: "CDE"}.get(number, ""):
            scheduler.add(requests[name])
        if number == blocks.SWAPPED:
            seq_ids = np.array([requests[name].seq_id for name in "ABCD"])
            assert manager.blocks_needed(seq_ids, np.ones(4, dtype=np.int64)).sum() == 4
            assert len(manager.block_ids(int(seq_ids[3]))) == 7
            assert manager.num_computed_tokens[seq_ids[3]] == 32
        step = scheduler.schedule()
        assert step is not None
        computed = step.plan.num_scheduled_tokens.tolist()
        names = [request.request_id for request in step.requests]
        assert dict(zip(names, computed, strict=True)) == counts
        assert manager.num_free_blocks == blocks.STEPS_FREE[number - 1]
        swapped = [copy.request_id for copy in step.swap_outs]
        assert swapped == (["D"] if number == blocks.SWAPPED else [])
        cells = ["out" if n in swapped else str(counts.get(n, "")) for n in blocks.PROMPTS]
        rows.append([str(number), *cells, str(manager.num_free_blocks)])
        scheduler.update(step, np.ones(len(step.sampled_seq_ids), dtype=np.int32))
    assert table("blocks", "step |") == rows
    assert requests["D"].times_passed == 1


# -- kernels --------------------------------------------------------------------------------------


def int4_layer(num_kv_heads: int = 1) -> LayerSpec:
    return LayerSpec(kv_format=INT4, num_kv_heads=num_kv_heads, key_dim=128, value_dim=128)


def test_a_record_has_the_sections_that_the_page_says() -> None:
    layout = int4_layer().record_layout(torch.bfloat16)
    assert layout.section_bytes == kernels.RECORD
    rows = [[name, str(size)] for name, size in kernels.RECORD.items()]
    assert [row[:2] for row in table("kernels", "section")] == rows
    assert layout.record_bytes == sum(kernels.RECORD.values()) == 17408
    assert layout.open_capacity == kernels.OPEN_TOKENS
    assert layout.open_capacity * 128 * 2 == kernels.OPEN_BYTES
    assert layout.record_bytes - 2 * kernels.OPEN_BYTES == 1024
    assert INT4.num_wide_channels(128) == 8


def test_codes_are_packed_as_drawn() -> None:
    codes = torch.tensor(kernels.CODES, dtype=torch.uint8)[:, None]
    assert tuple(pack_planes(codes, 2).flatten().tolist()) == kernels.PACKED


def test_scales_are_folded_as_drawn() -> None:
    keys, query = torch.tensor(kernels.KEYS).float(), torch.tensor(kernels.QUERY)
    codes, scale, zero = quantize_keys(keys[None, None], 1, 2, (1.0, 1.0))
    assert codes[0, 0].tolist() == [list(row) for row in kernels.KEY_CODES]
    assert (*scale.flatten().tolist(),) == kernels.KEY_SCALES
    assert (*zero.flatten().tolist(),) == kernels.KEY_ZEROS
    folded, dot = query * scale.flatten().float(), query @ zero.flatten().float()
    assert (*folded.tolist(),) == kernels.FOLDED
    assert dot == kernels.ZERO_DOT
    assert (*(codes[0, 0].float() @ folded + dot).tolist(),) == kernels.SCORES
    assert (*(keys @ query).tolist(),) == kernels.SCORES
    assert torch.equal(read_codes(codes, scale, zero, 2)[0, 0], keys)


def test_parts_merge_as_drawn() -> None:
    for scores, numbers, (top, total, output) in zip(
        kernels.PART_SCORES, kernels.PART_VALUES, kernels.PARTS, strict=True
    ):
        weights = 2.0 ** (np.array(scores) - max(scores))
        assert (max(scores), weights.sum(), weights @ numbers) == (top, total, output)
    total, output, result = kernels.MERGED
    assert np.dot(kernels.WEIGHTS, [part[1] for part in kernels.PARTS]) == total
    assert np.dot(kernels.WEIGHTS, [part[2] for part in kernels.PARTS]) == output
    # The definition has powers of e.
    scores = torch.tensor(sum(kernels.PART_SCORES, ())).double() * np.log(2)
    values = torch.tensor(sum(kernels.PART_VALUES, ())).double()[:, None, None]
    whole = weigh(scores[None, None], values, ScoreRules(1.0))
    assert whole.item() == pytest.approx(result, abs=1e-12)


def test_a_step_is_cut_into_the_items_that_the_page_says() -> None:
    pytest.importorskip("numba")
    from paged_kv.kernels.cpu.plan import plan_items
    from paged_kv.kernels.cpu.records import Item

    cache = PagedKVCache([int4_layer(2)], num_blocks=100, dtype=torch.bfloat16)
    manager = cache.new_manager(max_num_seqs=2, max_model_len=8192)
    lengths = np.array([5000, 300])
    seq_ids = [manager.add_sequence(np.arange(n + 1)) for n in lengths]
    for counts in (lengths, np.ones(2, dtype=np.int64)):
        plan = manager.reserve(np.array(seq_ids), counts)
        assert plan is not None
        step = cache.begin(plan)
        if counts is lengths:
            manager.commit(plan)
    assert step.inputs.num_sealed[0] == 38
    work = plan_items(step.inputs, 2, 4, num_threads=2)
    ranges = work.items[:, [Item.SEQUENCE, Item.START, Item.END]].tolist()
    names = ["long", "short"]
    assert list(dict.fromkeys((names[s], start, end) for s, start, end in ranges)) == list(
        kernels.ITEMS
    )
    counts_of = {tuple(each): ranges.count(each) for each in ranges}
    rows = [
        [str(lengths[s]), str(start), str(end), str(count)]
        for (s, start, end), count in counts_of.items()
    ]
    assert table("kernels", "context |") == rows


def test_sealing_finds_tokens_where_it_is_drawn() -> None:
    manager, replica = make_manager(), TableReplica(GEOMETRY)

    def arrays_of(seq_id: int, count: int) -> StepArrays:
        plan = manager.reserve([seq_id], [count])
        assert plan is not None
        replica.apply(plan)
        arrays = StepArrays.from_plan(GEOMETRY, plan, replica)
        manager.commit(plan)
        return arrays

    a = manager.add_sequence(PROMPT)
    for count in (9, 1, 1):
        arrays_of(a, count)
    arrays = arrays_of(a, 1)
    assert arrays.seal_sources.tolist() == [list(range(2, 10))]
    assert (arrays.seal_block_ids.tolist(), arrays.stored_slots.tolist()) == ([6], [11])
    b = manager.add_sequence(PROMPT)
    assert arrays_of(b, 21).seal_sources.tolist() == [
        [~token for token in range(first, first + 8)] for first in (2, 10)
    ]


def test_limits_are_those_of_the_code() -> None:
    pytest.importorskip("numba")
    from paged_kv.kernels.cpu.microkernels import MAX_ROWS, TILE_TOKENS
    from paged_kv.kernels.cpu.plan import MIN_SPLIT_TOKENS
    from paged_kv.kernels.cpu.records import ITEM_ROWS, PAIR_ITEM_ROWS
    from paged_kv.kernels.triton.launch import WIDE, tile_rows
    from paged_kv.kernels.triton.plan import FEW_ROWS

    small, large = tile_rows(8, WIDE, torch.device("cpu"))
    usual = signature(Scheduler).parameters
    steps_ahead, watermark = usual["steps_ahead"].default, usual["watermark"].default
    said = {
        "blocks": (
            f"worth {AGING_STEPS} steps of waiting",
            f"passed by {MAX_TIMES_PASSED}, then nobody",
            f"(usually {steps_ahead} and {watermark})",
        ),
        "kernels": (
            f"a microkernel takes 1, 2, 4 or {MAX_ROWS} rows",
            f"up to {ITEM_ROWS} rows, in tiles of {MAX_ROWS} ({PAIR_ITEM_ROWS} where",
            f"parts of at least {MIN_SPLIT_TOKENS} tokens",
            f"in tiles of {TILE_TOKENS} tokens",
            f"{small[0]} or {small[1]} rows where a sequence has up to {FEW_ROWS}, else {large}",
            f"for heads of more than {WIDE} channels",
            f"`int2` has {FORMATS['int2'].value_clip}",
        ),
    }
    for page, phrases in said.items():
        text = " ".join(PAGES[page].split())
        assert [phrase for phrase in phrases if phrase not in text] == []


def test_rotation_is_as_drawn() -> None:
    value = torch.tensor(kernels.VALUE)
    turned = rotate(value)
    assert (*turned.tolist(),) == kernels.ROTATED

    def as_read(numbers: torch.Tensor) -> torch.Tensor:
        return dequantize_symmetric(*quantize_centred(numbers, 2, 1.0), torch.float32, 2)

    back = rotate(as_read(turned))
    for numbers, drawn in (
        (as_read(value), kernels.READ),
        (as_read(turned), kernels.ROTATED_READ),
        (back, kernels.TURNED_BACK),
    ):
        assert numbers.tolist() == pytest.approx(drawn, abs=0.01)
    errors = [float(((read - value) ** 2).sum()) for read in (as_read(value), back)]
    assert errors == pytest.approx(kernels.ERRORS, abs=0.01)
