"""The drawings of docs/kernels.md. Knows small examples, whose numbers a test computes again."""

from __future__ import annotations

import drawing
from drawing import Block, Paint, Picture

# Bytes of a record of `int4`, head_dim 128, bf16: of its sections, and of its open reading.
RECORD = {
    "key_codes": 8192,
    "wide_codes": 256,
    "value_codes": 8192,
    "key_scale": 256,
    "key_zero": 256,
    "value_scale": 256,
}
OPEN_TOKENS, OPEN_BYTES = 32, 8192  # of keys, and again of values
# 2-bit codes of one channel, 8 tokens; and the bytes that hold them.
CODES, PACKED = (0, 3, 1, 2, 3, 0, 2, 1), (180, 75)
# A block of four keys of two channels, 2 bits, and a query.
KEYS = ((-1, 10), (2, 4), (0, 4), (1, 8))
KEY_CODES, KEY_SCALES, KEY_ZEROS = ((0, 3), (3, 0), (1, 0), (2, 2)), (1, 2), (-1, 4)
QUERY, FOLDED, ZERO_DOT, SCORES = (1, 0.5), (1, 1), 1, (4, 4, 2, 5)
# Two parts of a context: scores in powers of two, a value for each; what a part is, and the whole.
PART_SCORES, PART_VALUES = ((3, 3), (4, 3)), ((4, 4), (1, 4))
PARTS, WEIGHTS, MERGED = ((3, 2, 8), (4, 1.5, 3)), (0.5, 1), (2.5, 7, 2.8)
# A value of four channels: by itself in 2 bits, and multiplied by a Hadamard matrix.
VALUE, READ = (6, 0.5, -0.5, 0), (6, 2, -2, 2)
ROTATED, ROTATED_READ, TURNED_BACK = (3, 2.5, 3.5, 3), (3.5, 3.5, 3.5, 3.5), (7, 0, 0, 0)
ERRORS = (8.5, 1.5)
# Contexts of 5000 and 300 tokens in `int4`, 2 kv heads, 2 threads: parts, the longest first.
ITEMS = (
    ("long", 3872, 5000),
    ("long", 928, 1952),
    ("long", 2848, 3872),
    ("long", 0, 928),
    ("long", 1952, 2848),
    ("short", 0, 300),
)


def run(picture: Picture, x: float, y: float, numbers: tuple[float, ...], paint: Paint) -> None:
    """Numbers in a row of cells."""
    for index, number in enumerate(numbers):
        picture.cell(x + 58 * index, y, 54, 36, f"{number:g}", paint)


def draw_record() -> Picture:
    picture = Picture(390)
    picture.text(30, 36, "one record of int4: 17408 bytes", drawing.LARGE, bold=True)
    picture.text(30, 74, "sealed: 128 tokens", bold=True)
    total, x = sum(RECORD.values()), 30.0
    paints = {"key_codes": drawing.SEALED, "value_codes": drawing.CACHED}
    for name, size in RECORD.items():
        width = 540 * size / total
        paint = paints.get(name, drawing.PLAIN)
        picture.box(x, 88, width, 52, paint)
        if name in paints:
            label = name.replace("_", " ")
            picture.text(x + width / 2, 120, f"{label} {size}", drawing.SMALL, anchor="middle")
        x += width
    codes_end = 30 + 540 * RECORD["key_codes"] / total
    picture.line([(codes_end + 4, 140), (codes_end + 4, 158)], drawing.DIM)
    picture.note(codes_end + 10, 172, "upper bits of wide channels 256", anchor="middle")
    picture.line([(558, 140), (558, 182), (552, 182)], drawing.DIM)
    picture.note(546, 196, "key scale, key zero, value scale: 256 each", anchor="end")
    picture.text(30, 246, "open: 32 tokens in bf16", bold=True)
    width = 540 * OPEN_BYTES / total
    picture.cell(30, 260, width, 52, f"32 keys {OPEN_BYTES}", drawing.OPEN, drawing.SMALL)
    picture.cell(30 + width, 260, width, 52, f"32 values {OPEN_BYTES}", drawing.OPEN, drawing.SMALL)
    picture.box(30 + 2 * width, 260, 540 - 2 * width, 52, drawing.FREE)
    picture.note(570, 338, "1024 bytes that are not used", anchor="end")
    picture.note(30, 368, "one kv head of 128 channels, one layer; widths are to scale")
    return picture


def draw_packing() -> Picture:
    picture = Picture(330)
    picture.text(30, 36, "codes of one channel, 8 tokens", drawing.LARGE, bold=True)
    for token, code in enumerate(CODES):
        x = 50 + 62 * token
        picture.text(x + 26, 66, str(token), drawing.SMALL, anchor="middle", colour=drawing.DIM)
        picture.cell(x, 74, 52, 36, str(code), drawing.SEALED if token % 2 == 0 else drawing.OPEN)
    picture.text(30, 156, "two bytes: rows 0 and 1", drawing.LARGE, bold=True)
    for row, byte in enumerate(PACKED):
        y = 190 + 62 * row
        for plane in range(4):
            token = row + 2 * plane
            x = 50 + 96 * (3 - plane)
            bits = format(CODES[token], "02b")
            picture.cell(
                x, y, 92, 36, f"{bits[0]} {bits[1]}", drawing.OPEN if row else drawing.SEALED
            )
            picture.text(
                x + 46, y - 5, f"token {token}", drawing.SMALL, anchor="middle", colour=drawing.DIM
            )
        picture.text(446, y + 25, f"= {byte}", drawing.LARGE, bold=True)
    picture.note(50, 312, "the highest bits of a byte on the left")
    return picture


def draw_orders() -> Picture:
    picture = Picture(420)
    picture.text(30, 36, "what lies behind what in memory", drawing.LARGE, bold=True)
    cases = (("keys on a CPU", True), ("values on a CPU", False), ("keys on a GPU", False))
    for index, (name, by_channel) in enumerate((*cases, ("values on a GPU", True))):
        x, y = 60 + 280 * (index % 2), 84 + 170 * (index // 2)
        picture.text(x, y - 14, name, bold=True)
        for token in range(4):
            for channel in range(3):
                place = channel * 4 + token if by_channel else token * 3 + channel
                paint = drawing.SEALED if "keys" in name else drawing.CACHED
                at = x + 54 * token, y + 34 * channel
                picture.cell(*at, 50, 30, str(place), paint, drawing.SMALL)
        picture.note(x, y + 122, "tokens →, channels ↓")
    picture.note(30, 402, "numbers: places in memory")
    return picture


def draw_fold() -> Picture:
    picture = Picture(520)
    picture.text(30, 36, "once for a block", drawing.LARGE, bold=True)
    for y, name, numbers, paint in (
        (54, "query q", QUERY, drawing.OPEN),
        (98, "scale s", KEY_SCALES, drawing.PLAIN),
        (142, "zero point z", KEY_ZEROS, drawing.PLAIN),
    ):
        picture.text(30, y + 24, name)
        run(picture, 150, y, numbers, paint)
    picture.arrow([(270, 94), (310, 94)])
    picture.text(322, 86, "q · s, by channel", drawing.SMALL)
    run(picture, 460, 62, FOLDED, drawing.CACHED)
    picture.arrow([(270, 160), (310, 160)])
    picture.text(322, 166, "sum of q · z", drawing.SMALL)
    run(picture, 460, 142, (ZERO_DOT,), drawing.CACHED)
    picture.text(30, 228, "for each token: codes alone", drawing.LARGE, bold=True)
    for token, (codes, score) in enumerate(zip(KEY_CODES, SCORES, strict=True)):
        y = 246 + 50 * token
        picture.text(30, y + 24, f"token {token}")
        run(picture, 120, y, codes, drawing.SEALED)
        sums = f"{FOLDED[0]}·{codes[0]} + {FOLDED[1]}·{codes[1]} + {ZERO_DOT}"
        picture.text(260, y + 24, f"{sums}  =")
        run(picture, 440, y, (score,), drawing.CACHED)
    picture.note(
        30,
        470,
        "The same as with keys " + ", ".join(f"({a}, {b})" for a, b in KEYS) + ":",
        "no key was ever made of codes.",
    )
    return picture


def draw_merge() -> Picture:
    picture = Picture(400)
    picture.text(30, 36, "two parts of one context, computed apart", drawing.LARGE, bold=True)
    for index, name in enumerate(("first part", "second part")):
        x = 30 + 285 * index
        picture.box(x, 54, 255, 190, drawing.PLAIN)
        picture.text(x + 15, 80, name, bold=True)
        scores, values = PART_SCORES[index], PART_VALUES[index]
        for line, text in enumerate(
            (
                f"scores {scores[0]}, {scores[1]}; values {values[0]}, {values[1]}",
                f"maximum m = {PARTS[index][0]}",
                f"l = sum 2^(score - m) = {PARTS[index][1]:g}",
                f"output o = {PARTS[index][2]:g}",
            )
        ):
            picture.text(x + 15, 112 + 34 * line, text, drawing.SMALL)
        picture.arrow([(x + 127, 244), (x + 127, 276)])
    picture.box(30, 276, 540, 100, drawing.CACHED)
    total, output, result = MERGED
    for line, text in enumerate(
        (
            f"M = 4: the first counts 2^(3 - 4) = {WEIGHTS[0]}, the second 1",
            f"sum {WEIGHTS[0]} · 2 + 1.5 = {total}, output {WEIGHTS[0]} · 8 + 3 = {output}",
            f"{output} / {total} = {result}, as with all four at once",
        )
    ):
        picture.text(45, 302 + 28 * line, text, bold=line == 2)
    return picture


def draw_rows() -> Picture:
    picture = Picture(330)
    picture.text(30, 36, "8 query heads, 2 kv heads, 2 new tokens", drawing.LARGE, bold=True)
    for kv_head in range(2):
        y = 84 + 112 * kv_head
        picture.text(30, y - 12, f"rows of kv head {kv_head}", bold=True)
        for row in range(8):
            token, head = row // 4, row % 4 + 4 * kv_head
            x = 30 + 50 * row
            picture.box(x, y, 46, 56, drawing.SEALED if token else drawing.OPEN)
            picture.text(x + 23, y + 22, f"t{token}", drawing.SMALL, anchor="middle")
            picture.text(x + 23, y + 46, f"h{head}", drawing.SMALL, anchor="middle")
        picture.arrow([(430, y + 28), (462, y + 28)])
        picture.cell(462, y, 122, 56, "K, V read once", drawing.CACHED, 14)
    picture.note(
        30, 290, "t: new token, h: query head. Up to 8 rows are scored together,", "as one tile"
    )
    return picture


def draw_items() -> Picture:
    picture = Picture(430)
    picture.text(30, 36, "one kv head's items: where contexts are cut", drawing.LARGE, bold=True)
    scale = 540 / 5000
    for y, name in ((58, "long"), (118, "short")):
        for of, start, end in ITEMS:
            if of == name:
                paint = drawing.SEALED if name == "long" else drawing.OPEN
                label = f"{end - start}" if name == "long" else ""
                picture.cell(
                    30 + scale * start, y, scale * (end - start), 40, label, paint, drawing.SMALL
                )
    picture.note(70, 143, "300 tokens, whole")
    picture.text(30, 200, "drawn one by one, the longest first", drawing.LARGE, bold=True)
    for index in range(12):
        of, start, end = ITEMS[(0, 0, 1, 2, 1, 2, 3, 3, 4, 4, 5, 5)[index]]
        picture.cell(30 + 45 * index, 216, 41, 36, str(end - start), drawing.PLAIN, 14)
    picture.arrow([(150, 252), (150, 284)])
    picture.arrow([(440, 252), (440, 284)])
    for x, name in ((30, "thread 0"), (320, "thread 1")):
        picture.cell(x, 284, 240, 40, name, drawing.OPEN)
    picture.arrow([(150, 324), (150, 352)])
    picture.arrow([(440, 324), (440, 352)])
    picture.cell(
        30,
        352,
        530,
        40,
        "whoever ends the last part of a row merges its parts",
        drawing.CACHED,
        drawing.SMALL,
    )
    picture.note(30, 416, "numbers: tokens of context; int4, 2 kv heads, 2 threads")
    return picture


def draw_launches() -> Picture:
    picture = Picture(400)
    picture.text(30, 36, "one layer on a GPU: three launches, or four", drawing.LARGE, bold=True)
    picture.cell(30, 58, 260, 44, "open blocks, new tokens", drawing.OPEN)
    picture.cell(310, 58, 260, 44, "sealed body", drawing.SEALED)
    picture.note(310, 122, "few rows: attend_sealed", "many rows: attend_prefill")
    picture.note(30, 122, "attend_open: 1 part, or in", "native several")
    picture.arrow([(160, 150), (160, 180)])
    picture.arrow([(440, 150), (440, 180)])
    picture.box(30, 180, 540, 52, drawing.PLAIN)
    picture.text(300, 212, "parts: output, maximum, sum of weights", anchor="middle")
    picture.arrow([(300, 232), (300, 262)])
    picture.cell(
        30, 262, 540, 44, "merge_parts: output, and new tokens to their slots", drawing.CACHED
    )
    picture.arrow([(300, 306), (300, 336)])
    picture.cell(30, 336, 540, 44, "seal_blocks: only in steps that seal", drawing.FREE)
    return picture


def draw_sealing() -> Picture:
    picture = Picture(350)
    picture.text(30, 36, "A's token 11 comes: block 6 is sealed", drawing.LARGE, bold=True)
    for index in range(4):
        block = Block(index + 1, (2 * index + 2, 2 * index + 3))
        picture.block(30 + 82 * index, 56, block)
    picture.arrow([(352, 84), (392, 84)])
    picture.block(400, 56, Block(6, range(2, 10), is_sealed=True, is_new=True), width=150)
    picture.note(
        30,
        134,
        "seal_sources 2 3 4 5 6 7 8 9: slots of open blocks",
        "stored_slots 11: token 11 itself goes to block 5",
    )
    picture.text(
        30, 188, "B's prompt of 21 tokens, where nothing is shared", drawing.LARGE, bold=True
    )
    picture.box(30, 206, 312, 56, drawing.OPEN)
    picture.text(186, 240, "keys and values just computed", drawing.SMALL, anchor="middle")
    picture.arrow([(342, 234), (382, 234)])
    for index, first in enumerate((2, 10)):
        tokens = range(first, first + 8)
        picture.block(390 + 92 * index, 206, Block(index + 1, tokens, True, True), width=84)
    picture.note(
        30,
        286,
        "seal_sources -3 … -10 and -11 … -18: ~i is new token i,",
        "which never lies in an open block",
    )
    return picture


def draw_rotation() -> Picture:
    picture = Picture(440)
    picture.text(30, 36, "a value in 2 bits, by itself", drawing.LARGE, bold=True)
    rows = ((54, "value", VALUE, drawing.OPEN), (98, "as read", READ, drawing.SEALED))
    for y, name, numbers, paint in rows:
        picture.text(30, y + 24, name)
        run(picture, 190, y, numbers, paint)
    picture.text(440, 122, "errors² 8.5", bold=True)
    picture.text(30, 190, "multiplied by a Hadamard matrix", drawing.LARGE, bold=True)
    rows = (
        (208, "times matrix", ROTATED, drawing.CACHED),
        (252, "as read", ROTATED_READ, drawing.SEALED),
        (296, "times matrix again", TURNED_BACK, drawing.OPEN),
    )
    for y, name, numbers, paint in rows:
        picture.text(30, y + 24, name)
        run(picture, 190, y, numbers, paint)
    picture.text(440, 320, "errors² 1.5", bold=True)
    picture.note(
        30,
        372,
        "What stands out costs a little in every channel instead of much",
        "in the others. Attention is linear in values, so that only its",
        "output is turned back, once a token.",
    )
    return picture


def draw_sinks() -> Picture:
    picture = Picture(356)
    picture.text(
        30, 36, "2 sinks, a window of 8: the query at position 17", drawing.LARGE, bold=True
    )
    for position in range(18):
        paint = drawing.CACHED if position < 2 else drawing.FREE if position < 10 else drawing.OPEN
        picture.cell(21 + 31 * position, 130, 28, 36, str(position), paint, 14)
    picture.note(150, 192, "2-9 evicted")
    picture.arrow([(562, 130), (562, 92), (345, 92), (345, 130)])
    picture.note(540, 84, "query at 17: distances 7 to 0", anchor="end")
    for slot in range(10):
        paint = drawing.CACHED if slot < 2 else drawing.PLAIN if slot < 9 else drawing.OPEN
        picture.cell(21 + 31 * slot, 236, 28, 36, str(slot), paint, 14)
    picture.arrow([(314, 272), (314, 300), (51, 300), (51, 272)], drawing.CHANGED.line)
    picture.note(336, 258, "query turned back by 8,", "to 9: distances 9 and 8")
    picture.note(30, 336, "Stored keys are never turned again.")
    return picture


PICTURES = {
    "kernels-record": draw_record,
    "kernels-packing": draw_packing,
    "kernels-orders": draw_orders,
    "kernels-fold": draw_fold,
    "kernels-merge": draw_merge,
    "kernels-rows": draw_rows,
    "kernels-items": draw_items,
    "kernels-launches": draw_launches,
    "kernels-sealing": draw_sealing,
    "kernels-rotation": draw_rotation,
    "kernels-sinks": draw_sinks,
}
