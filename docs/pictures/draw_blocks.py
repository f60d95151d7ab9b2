"""The drawings of docs/blocks.md. Knows what a manager of a small geometry answers: the test asks.

Blocks of 8 tokens sealed and of 2 open, 2 tokens of head and at least 2 of tail: what `int4` has at
a head_dim of 128 in bf16, divided by 16.
"""

from __future__ import annotations

from typing import NamedTuple

import drawing
from drawing import Block, Picture

NUM_BLOCKS = 16
OPEN_SIZE, SEALED_SIZE, HEAD = 2, 8, 2


class Held(NamedTuple):
    """Blocks of a sequence that stores so many tokens, and of the pool those that are free."""

    num_tokens: int
    head: tuple[int, ...]
    body: tuple[int, ...]
    tail: tuple[int, ...]
    num_free: int = 0
    num_evicted: int = 0


# Sequence A, as it grows; B, which finds two of its blocks; F, a fork of B, before and after both
# have written.
GROWTH = (
    Held(9, (0,), (), (1, 2, 3, 4), 11),
    Held(10, (0,), (), (1, 2, 3, 4), 11),
    Held(11, (0,), (), (1, 2, 3, 4, 5), 10),
    Held(12, (0,), (6,), (5,), 13),
    Held(13, (0,), (6,), (5, 1), 12),
)
SHARED = (Held(10, (0,), (6,), (), 12), Held(21, (0,), (6, 2), (3, 4), 9))
FORKED = (Held(22, (0,), (6, 2), (3, 7), 8), Held(22, (0,), (6, 2), (3, 4), 8))
# What is evicted first, once A, B and F have ended.
IDLE = (2, 6, 0)
# At 28 tokens, of layers that keep all and of layers with a window of 8.
GROUPS = (Held(28, (0,), (12, 8, 2), (14,), 24), Held(12, (1,), (15,), (7,), 24, 16))
# Of a stream with 2 sinks and a window of 8, before and after a block is let go.
STREAM = (Held(16, (0,), (6,), (5, 1, 2)), Held(9, (0,), (), (5, 1, 2, 3), 0, 8))


def blocks_of(held: Held, new: tuple[int, ...] = ()) -> list[Block]:
    """With the tokens that lie in them, by their positions in the sequence."""
    blocks, position, end = [], 0, held.num_tokens
    for ids, size in ((held.head, OPEN_SIZE), (held.body, SEALED_SIZE), (held.tail, OPEN_SIZE)):
        for block_id in ids:
            shift = held.num_evicted if position >= HEAD else 0
            tokens = range(position + shift, min(position + size, end) + shift)
            blocks.append(Block(block_id, tokens, size == SEALED_SIZE, block_id in new))
            position += size
    return blocks


def brace(picture: Picture, x: float, width: float, y: float, name: str) -> None:
    """A name above some blocks."""
    picture.line([(x, y + 6), (x, y), (x + width, y), (x + width, y + 6)], drawing.DIM)
    picture.text(x + width / 2, y - 7, name, drawing.SMALL, anchor="middle", colour=drawing.DIM)


def draw_pool() -> Picture:
    picture = Picture(400)
    picture.text(30, 36, "one block, two readings of the same bytes", drawing.LARGE, bold=True)
    for x, block in ((30, Block(5, (10, 11))), (310, Block(6, range(2, 10), True))):
        picture.block(x, 54, block, width=260)
    picture.note(30, 132, "open: 2 tokens, full precision")
    picture.note(310, 132, "sealed: 8 tokens, codes")
    picture.text(30, 182, "the pool: 16 blocks, whoever needs one", drawing.LARGE, bold=True)
    growth, (_, shared) = GROWTH[-1], SHARED
    names: dict[int, str] = {}
    for name, held in (("A", growth), ("B", shared)):
        for block_id in (*held.head, *held.body, *held.tail):
            names[block_id] = names.get(block_id, "") + name
    sealed = {*growth.body, *shared.body}
    for block_id in range(NUM_BLOCKS):
        x, y = 30 + 68 * (block_id % 8), 200 + 64 * (block_id // 8)
        paint = (
            drawing.SEALED
            if block_id in sealed
            else drawing.OPEN
            if block_id in names
            else drawing.FREE
        )
        picture.box(x, y, 62, 54, paint)
        picture.text(x + 6, y + 18, str(block_id), drawing.SMALL)
        picture.text(x + 31, y + 42, names.get(block_id, "free"), drawing.SMALL, anchor="middle")
    picture.note(
        30,
        350,
        "A and B: sequences of 13 and 21 tokens. Blocks 0 and 6 are",
        "used by both: their first 10 tokens are the same.",
    )
    return picture


def draw_sequence() -> Picture:
    held = SHARED[1]
    picture = Picture(310)
    picture.text(30, 36, "B: 21 tokens in 5 blocks", drawing.LARGE, bold=True)
    x, step = 40, 106
    for name, first, count in (("head", 0, 1), ("body", 1, 2), ("tail", 3, 2)):
        brace(picture, x + step * first, step * count - 10, 74, name)
    for index, block in enumerate(blocks_of(held)):
        picture.block(x + step * index, 86, block, width=96)
    picture.text(30, 190, "its block table", drawing.LARGE, bold=True)
    for place, entry in enumerate(table_of(held)):
        at = 30 + 49 * place
        paint = (
            drawing.FREE
            if entry is None
            else drawing.SEALED
            if entry in held.body
            else drawing.OPEN
        )
        picture.cell(at, 206, 46, 38, "-" if entry is None else str(entry), paint)
        picture.text(at + 23, 262, str(place), drawing.SMALL, anchor="middle", colour=drawing.DIM)
    picture.note(30, 290, "place i is for tokens 2i and 2i + 1; nobody reads what is marked -")
    return picture


def table_of(held: Held) -> list[int | None]:
    """The places of a block table: of a sealed block's, the first has its id."""
    places: list[int | None] = [*held.head]
    for block_id in held.body:
        places += [block_id, *[None] * (SEALED_SIZE // OPEN_SIZE - 1)]
    return [*places, *held.tail]


def draw_sealing() -> Picture:
    picture = Picture(500)
    picture.text(30, 36, "A, one token a step", drawing.LARGE, bold=True)
    new = ((0, 1, 2, 3, 4), (), (5,), (6,), (1,))
    for index, held in enumerate(GROWTH):
        y = 58 + 84 * index
        picture.text(20, y + 25, f"{held.num_tokens}", drawing.LARGE, bold=True)
        picture.note(20, y + 45, f"free {held.num_free}")
        picture.row(92, y, blocks_of(held, new[index]))
    picture.note(92, 484, "framed: taken from the pool in this step")
    return picture


def draw_step() -> Picture:
    picture = Picture(470)
    for x, width, name in ((20, 250, "manager"), (330, 250, "who runs the model")):
        picture.box(x, 50, width, 400, drawing.PLAIN)
        picture.text(x + width / 2, 36, name, drawing.LARGE, anchor="middle", bold=True)
    picture.cell(40, 70, 210, 40, "reserve: take block 6", drawing.OPEN)
    picture.box(40, 130, 520, 138, drawing.CACHED)
    picture.text(55, 156, "the plan, plain data: A stores token 11", drawing.SMALL, bold=True)
    for line, text in enumerate(
        (
            "new_block_ids [6], seal_block_ids [6]",
            "block_counts [1 sealed, 0 opened, 4 leaving, 0 copied]",
            "freed_block_ids [1 2 3 4], free once it is committed",
            "table_update: rows that no plan has told",
        )
    ):
        picture.text(55, 182 + 23 * line, text, drawing.SMALL)
    picture.arrow([(145, 110), (145, 130)])
    picture.arrow([(455, 268), (455, 290)])
    picture.cell(350, 290, 210, 40, "replica of the tables", drawing.OPEN)
    picture.arrow([(455, 330), (455, 352)])
    picture.cell(350, 352, 210, 40, "kernels, by layer", drawing.SEALED)
    picture.arrow([(350, 372), (250, 372)])
    picture.cell(40, 342, 210, 60, "", drawing.OPEN)
    picture.text(145, 366, "commit: 6 is sealed,", drawing.SMALL, anchor="middle")
    picture.text(145, 388, "1 2 3 4 are free", drawing.SMALL, anchor="middle")
    picture.text(145, 430, "or rollback: 6 goes back", drawing.SMALL, anchor="middle")
    return picture


def draw_prefix() -> Picture:
    picture = Picture(520)
    picture.text(30, 36, "links, each hash covers the one before", drawing.LARGE, bold=True)
    links = (("root", ""), ("link 0", "0-1"), ("link 1", "2-9"), ("link 2", "10-17"))
    for index, (name, tokens) in enumerate(links):
        x = 30 + 140 * index
        picture.box(x, 54, 112, 56, drawing.CACHED if index else drawing.PLAIN)
        picture.text(x + 56, 78, name, anchor="middle", bold=True)
        picture.text(x + 56, 100, tokens or "model, format", drawing.SMALL, anchor="middle")
        if index:
            picture.arrow([(x - 28, 82), (x, 82)])
    for index, (block_id, size) in enumerate(((0, "open"), (6, "sealed"), (2, "sealed"))):
        x = 170 + 140 * index
        picture.arrow([(x + 56, 110), (x + 56, 138)], drawing.CACHED.line)
        picture.cell(
            x, 138, 112, 36, f"block {block_id}", drawing.OPEN if size == "open" else drawing.SEALED
        )
    picture.text(30, 218, "B: found, then computed", drawing.LARGE, bold=True)
    found = len(blocks_of(SHARED[0]))
    picture.row(92, 262, blocks_of(SHARED[1]), 96)
    brace(picture, 92, 96 * found - 20, 250, "shared with A")
    brace(picture, 92 + 96 * found, 96 * 3 - 20, 250, "11 tokens, own")
    picture.text(30, 372, "all have ended: idle, and still found", drawing.LARGE, bold=True)
    for index, block_id in enumerate(IDLE):
        x = 92 + 120 * index
        picture.cell(x, 390, 90, 40, f"block {block_id}", drawing.CACHED)
        if index:
            picture.arrow([(x - 30, 410), (x, 410)])
    picture.note(
        92,
        456,
        "evicted from left to right, when no other block is free:",
        "least recently used first, the end of a sequence before",
        "its beginning",
    )
    return picture


def draw_fork() -> Picture:
    picture = Picture(480)
    picture.text(30, 36, "fork: every block has one user more", drawing.LARGE, bold=True)
    before = blocks_of(SHARED[1])
    for name, y in (("B", 56), ("F", 138)):
        picture.text(36, y + 36, name, drawing.LARGE, bold=True)
    picture.row(80, 56, before, 100)
    for index in range(len(before)):
        picture.line([(118 + 100 * index, 112), (118 + 100 * index, 138)], drawing.OPEN.line, "4 3")
        picture.cell(80 + 100 * index, 138, 76, 40, "2 users", drawing.PLAIN, drawing.SMALL)
    picture.text(30, 226, "both store token 21 in one step", drawing.LARGE, bold=True)
    for y, held, name in ((246, FORKED[0], "B"), (364, FORKED[1], "F")):
        picture.text(36, y + 36, name, drawing.LARGE, bold=True)
        picture.row(80, y, blocks_of(held, (7,)), 100)
    picture.arrow([(518, 364), (518, 305)], drawing.CHANGED.line)
    picture.note(506, 340, "copy block 4", anchor="end")
    picture.note(30, 452, "one copy for two writers: the last of all users keeps the block")
    return picture


def draw_groups() -> Picture:
    picture = Picture(340)
    picture.text(30, 36, "28 tokens, two groups of layers, one pool", drawing.LARGE, bold=True)
    picture.text(30, 74, "layers that keep all", bold=True)
    picture.row(30, 90, blocks_of(GROUPS[0]), 110)
    picture.text(30, 190, "layers with a window of 8", bold=True)
    head, body, tail = blocks_of(GROUPS[1])
    for index, block in ((0, head), (3, body), (4, tail)):
        picture.block(30 + 110 * index, 206, block)
    picture.box(140, 206, 186, 56, drawing.FREE)
    picture.text(233, 240, "2-17: let go", drawing.SMALL, anchor="middle")
    picture.note(
        30,
        292,
        "5 blocks and 3: a block belongs to one group, and holds the",
        "records of that group's layers",
    )
    return picture


def draw_window() -> Picture:
    picture = Picture(400)
    picture.text(30, 36, "2 sinks, a window of 8", drawing.LARGE, bold=True)
    titles = ("16 tokens: the next one sees 0 1 and 9 to 16", "17 tokens: it sees 0 1 and 10 to 17")
    for index, (held, title) in enumerate(zip(STREAM, titles, strict=True)):
        y = 72 + 150 * index
        picture.text(30, y, title, bold=True)
        for place, block in enumerate(blocks_of(held, (3,) if index else ())):
            picture.block(30 + 96 * place, y + 22, block)
    picture.arrow([(164, 150), (164, 184)], drawing.CHANGED.line)
    picture.note(176, 178, "tokens 2-9 are evicted, block 6 is free")
    picture.note(
        30,
        330,
        "16 tokens stored, then 9: place 1 of the table is now tokens",
        "10 and 11, and 8 tokens count as evicted. Nothing is moved",
        "or quantized again.",
    )
    return picture


# Tokens that requests compute in steps of a scheduler, by request; what is waited for and swapped.
STEPS: tuple[dict[str, int], ...] = (
    {"A": 8, "B": 6},
    {"A": 1, "B": 1},
    {"A": 1, "B": 1, "C": 8, "D": 6},
    {"A": 1, "B": 1, "C": 8, "D": 6},
    {"A": 1, "B": 1, "C": 4, "D": 8},
    {"A": 1, "B": 1, "C": 1, "D": 8},
    {"A": 1, "B": 1, "C": 1, "D": 2},
    {"A": 1, "B": 1, "C": 1, "D": 1},
    {"A": 1, "B": 1, "C": 1, "D": 1},
    {"A": 1, "B": 1, "C": 1},
    {"A": 1, "B": 1, "C": 1, "E": 4},
)
STEPS_FREE = (17, 15, 8, 0, 0, 3, 2, 2, 2, 6, 4)
PROMPTS = {"A": 9, "B": 6, "C": 20, "D": 30, "E": 4}
SWAPPED = 10  # the step before which D leaves


def draw_steps() -> Picture:
    picture = Picture(430)
    picture.text(
        30, 36, "tokens that each request computes, step by step", drawing.LARGE, bold=True
    )
    for step in range(len(STEPS)):
        picture.text(
            96 + 45 * step, 66, str(step + 1), drawing.SMALL, anchor="middle", colour=drawing.DIM
        )
    for row, (name, length) in enumerate(PROMPTS.items()):
        y = 78 + 52 * row
        picture.text(24, y + 20, name, drawing.LARGE, bold=True)
        picture.note(20, y + 38, f"of {length}")
        for step, counts in enumerate(STEPS):
            count, x = counts.get(name, 0), 76 + 45 * step
            if count:
                picture.cell(
                    x, y, 41, 42, str(count), drawing.OPEN if count == 1 else drawing.SEALED
                )
            elif step >= (9 if name == "D" else 2) and name in "DE":
                word = "out" if name == "D" and step + 1 == SWAPPED else "wait"
                picture.cell(x, y, 41, 42, word, drawing.FREE, 14)
    picture.text(20, 360, "free", drawing.SMALL, colour=drawing.DIM)
    for step, num_free in enumerate(STEPS_FREE):
        picture.text(96 + 45 * step, 360, str(num_free), drawing.SMALL, anchor="middle")
    picture.note(
        20,
        388,
        "blue: one token. orange: a piece of a prompt. free: blocks behind",
        "each step, of 24",
    )
    return picture


def draw_failure() -> Picture:
    picture = Picture(330)
    picture.text(30, 36, "a change is whole, or known not to be", drawing.LARGE, bold=True)
    for x, name, paint in (
        (30, "checks", drawing.PLAIN),
        (170, "change", drawing.OPEN),
        (400, "whole again", drawing.CACHED),
    ):
        width = {"checks": 110, "change": 200, "whole again": 160}[name]
        picture.cell(x, 62, width, 52, name, paint)
    picture.arrow([(140, 88), (170, 88)])
    picture.arrow([(370, 88), (400, 88)])
    picture.note(36, 138, "may refuse:", "nothing changed")
    picture.arrow([(270, 114), (270, 190)], drawing.CHANGED.line)
    picture.note(284, 142, "an exception,", "between any two lines")
    picture.cell(170, 190, 200, 52, "unfinished", drawing.FREE)
    picture.arrow([(370, 216), (400, 216)])
    picture.cell(400, 190, 160, 52, "recover()", drawing.SEALED)
    picture.arrow([(480, 190), (480, 114)])
    picture.note(
        30,
        276,
        "while it is unfinished every change is refused; recover() drops all",
        "sequences, and may itself be cut off and called again",
    )
    return picture


PICTURES = {
    "blocks-pool": draw_pool,
    "blocks-sequence": draw_sequence,
    "blocks-sealing": draw_sealing,
    "blocks-step": draw_step,
    "blocks-prefix": draw_prefix,
    "blocks-fork": draw_fork,
    "blocks-groups": draw_groups,
    "blocks-window": draw_window,
    "blocks-steps": draw_steps,
    "blocks-failure": draw_failure,
}
