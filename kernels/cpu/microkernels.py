"""The inner loops of attention on a CPU, for a few query rows and one block, as machine code.

Knows addresses and element kinds, nothing of tables or sequences. All sums run vertically: keys are
read channel by channel with tokens in the lanes, values token by token with channels in the lanes.
Codes become floats in registers; scales and zero points are folded into queries, scores and
weights. Rows of scratch have fixed strides: see `ROW_STRIDE`.

Long because what writes a loop nests as the loop does, and a microkernel is one nest of them.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import Any, Final

from llvmlite import ir

from .elements import ELEMENT_BYTES, NUM_PLANES, decode, encode, load_raw
from .vectors import (
    CACHE_LINE,
    FLOAT,
    HALF,
    INT,
    LONG,
    Emitter,
    MachineCode,
    host_width,
)

MAX_DIM: Final = 256
MAX_CHANNELS: Final = MAX_DIM * 3 // 2  # of keys, with the wide ones once more behind them
MAX_ROWS: Final = 8  # query rows that a kernel works on at once
TILE_TOKENS: Final = 128  # tokens whose scores are kept at once
# Floats from one row of queries or of scores to the next: a cache line more than they hold, so
# that rows do not fall on the same lines of the cache.
ROW_STRIDE: Final = MAX_CHANNELS + 16
SCORE_STRIDE: Final = TILE_TOKENS + 16
MAX_KEY_GROUPS: Final = 4
STATE_LANES: Final = 16  # partial sums of the softmax are kept by lane
MASKED: Final = -1e30  # a score that is not seen; below any real one

# Accumulators that fit the vector registers beside operands, by lanes of a vector.
NUM_ACCUMULATORS: Final = {16: 16, 8: 8, 4: 16}
MIN_ACCUMULATORS: Final = 8  # fewer cannot hide the latency of an FMA


def prefetch_lines(emitter: Emitter, address: Any, num_bytes: int) -> None:
    for position in range(0, num_bytes, CACHE_LINE):
        emitter.prefetch(emitter.offset(address, position))


class Accumulators:
    """Sums [copies][...] in registers; copies break up the chain of dependent additions."""

    def __init__(self, emitter: Emitter, count: int, copies: int, lanes: int) -> None:
        self._emitter = emitter
        zero = emitter.constant(0.0, lanes)
        self._places = [[emitter.variable(zero) for _ in range(count)] for _ in range(copies)]

    def add(self, turn: int, index: int, a: Any, b: Any) -> None:
        """Add a * b to sum `index`, in the copy whose turn it is."""
        place = self._places[turn % len(self._places)][index]
        builder = self._emitter.builder
        builder.store(self._emitter.fma(a, b, builder.load(place)), place)

    def total(self, index: int) -> Any:
        builder = self._emitter.builder
        total, *rest = (builder.load(copy[index]) for copy in self._places)
        for value in rest:
            total = builder.fadd(total, value)
        return total


@cache
def score_kernel(
    kind: str, rows: int, num_token_rows: int, is_grouped: bool, adds: bool, max_lanes: int
) -> MachineCode:
    """Dot products of `rows` queries with a block's keys; `adds` them to what scores there are.

    Arguments: keys [key_dim][key_stride bytes], queries [groups][rows][ROW_STRIDE] and scores
    [rows][SCORE_STRIDE] (addresses), key_dim, key_stride, log2 of the tokens that share a group of
    queries, address to prefetch from. Token rows are bytes below 8 bits: row t of plane p is token
    t + p * num_token_rows.
    """
    lanes = gcd(max_lanes, num_token_rows)
    planes, element = NUM_PLANES[kind], ELEMENT_BYTES[kind]
    limit = NUM_ACCUMULATORS[max_lanes]
    # As many vectors of tokens at once as there is room for, sharing each query element.
    tokens_at_once = num_token_rows // lanes
    while tokens_at_once > 1 and (
        tokens_at_once * planes * rows > limit or num_token_rows // lanes % tokens_at_once
    ):
        tokens_at_once -= 1
    plane_sets = [list(range(planes))]
    while len(plane_sets[0]) > 1 and tokens_at_once * len(plane_sets[0]) * rows > limit:
        half = len(plane_sets[0]) // 2
        plane_sets = [part for s in plane_sets for part in (s[:half], s[half:])]
    num_sums = tokens_at_once * len(plane_sets[0]) * rows
    copies = next(c for c in (1, 2, 4, 8) if c * num_sums >= MIN_ACCUMULATORS or c == 8)
    bytes_at_once = tokens_at_once * lanes * element
    unroll = min(8, max(copies, CACHE_LINE // bytes_at_once, 2))

    emitter = Emitter("scores", 7)
    keys, queries, scores, key_dim, key_stride, group_shift, following = emitter.arguments
    builder = emitter.builder
    with emitter.loop(
        emitter.long(0), emitter.long(num_token_rows), tokens_at_once * lanes
    ) as first_row:
        for plane_set in plane_sets:
            sums = Accumulators(emitter, num_sums, copies, lanes)

            def query_base(plane: int, vector: int, first_row: Any = first_row) -> Any:
                if not is_grouped:
                    return queries
                token = emitter.offset(first_row, plane * num_token_rows + vector * lanes)
                group = builder.lshr(token, group_shift)
                return emitter.offset(queries, emitter.times(group, MAX_ROWS * ROW_STRIDE * 4))

            bases = {(p, v): query_base(p, v) for p in plane_set for v in range(tokens_at_once)}
            start = emitter.offset(keys, emitter.times(first_row, element))
            with emitter.loop(emitter.long(0), key_dim, unroll) as channel:
                for turn in range(unroll):
                    row = builder.add(channel, emitter.long(turn))
                    line = builder.add(start, builder.mul(row, key_stride))
                    vectors: dict[tuple[int, int], Any] = {}
                    for vector in range(tokens_at_once):
                        raw = load_raw(
                            emitter, emitter.offset(line, vector * lanes * element), kind, lanes
                        )
                        decoded = decode(emitter, raw, kind)
                        vectors |= {(p, vector): decoded[p] for p in plane_set}
                    for query_row in range(rows):
                        shared: dict[Any, Any] = {}
                        for place, (key, base) in enumerate(bases.items()):
                            if base not in shared:
                                address = emitter.offset(
                                    base,
                                    emitter.times(channel, 4),
                                    (query_row * ROW_STRIDE + turn) * 4,
                                )
                                shared[base] = emitter.splat(emitter.load(address, FLOAT), lanes)
                            index = query_row * len(bases) + place
                            sums.add(turn, index, vectors[key], shared[base])
                if plane_set is plane_sets[0]:
                    passed = emitter.times(builder.mul(first_row, key_dim), element)
                    ahead = emitter.offset(following, passed, emitter.times(channel, bytes_at_once))
                    prefetch_lines(emitter, ahead, max(CACHE_LINE, unroll * bytes_at_once))
            for query_row in range(rows):
                for place, (plane, vector) in enumerate(bases):
                    token = query_row * SCORE_STRIDE + plane * num_token_rows + vector * lanes
                    address = emitter.offset(scores, emitter.times(first_row, 4), token * 4)
                    total = sums.total(query_row * len(bases) + place)
                    if adds:
                        total = builder.fadd(total, emitter.load(address, FLOAT, lanes))
                    emitter.store(total, address)
    return MachineCode("scores", emitter.finish())


@cache
def value_kernel(kind: str, rows: int, value_dim: int, shift: int, max_lanes: int) -> MachineCode:
    """Add the weighted values of a block to the outputs of `rows` queries; codes as in `decode`.

    Arguments: values [token rows][value_stride bytes], weights [rows][SCORE_STRIDE] and outputs
    [rows][ROW_STRIDE] (addresses), token rows to add, tokens from one plane to the next,
    value_stride, address to prefetch from.
    """
    limit = NUM_ACCUMULATORS[max_lanes]
    emitter = Emitter("values", 7)
    whole, rest = divmod(value_dim, max_lanes)
    vectors_at_once = max(
        (n for n in range(1, whole + 1) if whole % n == 0 and n * rows <= limit), default=0
    )
    if whole:
        with emitter.loop(
            emitter.long(0), emitter.long(whole * max_lanes), vectors_at_once * max_lanes
        ) as channel:
            add_values(emitter, kind, shift, rows, vectors_at_once, max_lanes, channel)
    if rest:  # dims are multiples of 8
        add_values(emitter, kind, shift, rows, 1, rest, emitter.long(whole * max_lanes))
    return MachineCode("values", emitter.finish())


def add_values(
    emitter: Emitter,
    kind: str,
    shift: int,
    rows: int,
    num_vectors: int,
    lanes: int,
    channel: Any,
) -> None:
    """Add all tokens to `num_vectors` vectors of channels, from `channel` on."""
    values, weights, outputs, num_tokens, plane_stride, value_stride, following = emitter.arguments
    builder, element = emitter.builder, ELEMENT_BYTES[kind]
    num_sums = num_vectors * rows
    copies = next(c for c in (1, 2, 4) if c * num_sums >= MIN_ACCUMULATORS // 2 or c == 4)
    sums = Accumulators(emitter, num_sums, copies, lanes)
    start = emitter.offset(values, emitter.times(channel, element))
    plane_bytes = emitter.times(plane_stride, 4)
    bytes_at_once = num_vectors * lanes * element

    def add_token(token: Any, turn: int) -> None:
        line = builder.add(start, builder.mul(token, value_stride))
        raw = [
            load_raw(emitter, emitter.offset(line, vector * lanes * element), kind, lanes)
            for vector in range(num_vectors)
        ]
        decoded = [decode(emitter, vector, kind, shift) for vector in raw]
        base = emitter.offset(weights, emitter.times(token, 4))
        for plane in range(NUM_PLANES[kind]):
            if plane:
                base = builder.add(base, plane_bytes)
            for row in range(rows):
                weight = emitter.load(emitter.offset(base, row * SCORE_STRIDE * 4), FLOAT)
                weight = emitter.splat(weight, lanes)
                for vector in range(num_vectors):
                    index = row * num_vectors + vector
                    sums.add(turn + plane, index, decoded[vector][plane], weight)

    unroll = max(2, copies)
    even = builder.sub(num_tokens, builder.urem(num_tokens, emitter.long(unroll)))
    with emitter.loop(emitter.long(0), even, unroll) as token:
        for turn in range(unroll):
            add_token(emitter.offset(token, turn), turn)
        passed = emitter.times(builder.mul(channel, num_tokens), element)
        ahead = emitter.offset(following, passed, emitter.times(token, bytes_at_once))
        prefetch_lines(emitter, ahead, max(CACHE_LINE, unroll * bytes_at_once))
    with emitter.loop(even, num_tokens, 1) as token:
        add_token(token, 0)
    for row in range(rows):
        for vector in range(num_vectors):
            address = emitter.offset(
                outputs, emitter.times(channel, 4), (row * ROW_STRIDE + vector * lanes) * 4
            )
            total = sums.total(row * num_vectors + vector)
            emitter.store(builder.fadd(emitter.load(address, FLOAT, lanes), total), address)


@cache
def softmax_kernel(
    key_scaling: str,
    value_scaling: str,
    centre: float,
    has_softcap: bool,
    max_lanes: int,
) -> MachineCode:
    """Turn a tile's scores into weights, row by row, and carry the running softmax on.

    Arguments: scores [rows][SCORE_STRIDE], number of rows, tokens (a multiple of the lanes), first
    visible token and one past the last [rows] (64-bit), maxima [rows], sums [2][MAX_ROWS]
    [STATE_LANES], outputs [rows][ROW_STRIDE], value_dim, softcap address (in units of the
    softmax), key scale, value scale, value zero point (half [tokens]), key zero dots
    [groups][MAX_ROWS], log2 of the tokens of a group.

    `key_scaling` is "none", "token" (scores times key scale) or "channel" (scores plus the zero
    points' dot), `value_scaling` "none", "scale" (weights times value scale; what a value is where
    its code is 0 is `-centre` scales, summed apart) or "zero" (so are zero points).
    """
    lanes = max_lanes
    emitter = Emitter("softmax", 15)
    (scores, num_rows, num_tokens, first, past, maxima, sums, outputs, value_dim, softcap) = (
        emitter.arguments[:10]
    )
    key_scale, value_scale, value_zero, zero_dots, group_shift = emitter.arguments[10:]
    builder = emitter.builder
    masked = emitter.constant(MASKED, lanes)
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        line = emitter.offset(scores, emitter.times(row, SCORE_STRIDE * 4))
        row_long, row_float = emitter.times(row, 8), emitter.times(row, 4)
        row_first, row_past = (
            emitter.splat(builder.trunc(emitter.load(builder.add(a, row_long), LONG), INT), lanes)
            for a in (first, past)
        )
        highest = emitter.variable(masked)
        with emitter.loop(emitter.long(0), num_tokens, lanes) as token:
            place = builder.add(line, emitter.times(token, 4))
            score = emitter.load(place, FLOAT, lanes)
            if key_scaling == "token":
                scale = emitter.load(builder.add(key_scale, emitter.times(token, 2)), HALF, lanes)
                score = builder.fmul(score, emitter.half_to_float(scale))
            elif key_scaling == "channel":
                group = emitter.times(builder.lshr(token, group_shift), MAX_ROWS * 4)
                dot = emitter.load(emitter.offset(zero_dots, group, row_float), FLOAT)
                score = builder.fadd(score, emitter.splat(dot, lanes))
            if has_softcap:
                cap = emitter.splat(emitter.load(softcap, FLOAT), lanes)
                score = builder.fmul(cap, tanh(emitter, score))
            number = emitter.splat(builder.trunc(token, INT), lanes)
            number = builder.add(number, emitter.lane_numbers(lanes))
            is_visible = builder.and_(
                builder.icmp_signed(">=", number, row_first),
                builder.icmp_signed("<", number, row_past),
            )
            score = builder.select(is_visible, score, masked)
            emitter.store(score, place)
            builder.store(emitter.maximum(score, builder.load(highest)), highest)
        maximum_place = builder.add(maxima, row_float)
        before = emitter.load(maximum_place, FLOAT)
        now = emitter.reduce(builder.load(highest), emitter.maximum)
        now = emitter.strict_maximum(before, now)
        emitter.store(now, maximum_place)
        row_sums = emitter.offset(sums, emitter.times(row, STATE_LANES * 4))
        zero_sums = emitter.offset(row_sums, MAX_ROWS * STATE_LANES * 4)
        with builder.if_then(builder.fcmp_ordered(">", now, before)):
            factor = emitter.exp2(emitter.splat(builder.fsub(before, now), lanes))
            for place in (row_sums, zero_sums):
                emitter.store(builder.fmul(emitter.load(place, FLOAT, lanes), factor), place)
            output = emitter.offset(outputs, emitter.times(row, ROW_STRIDE * 4))
            with emitter.loop(emitter.long(0), value_dim, lanes) as channel:
                address = builder.add(output, emitter.times(channel, 4))
                scaled = builder.fmul(emitter.load(address, FLOAT, lanes), factor)
                emitter.store(scaled, address)
        maximum = emitter.splat(now, lanes)
        total = emitter.variable(emitter.load(row_sums, FLOAT, lanes))
        zero_total = emitter.variable(emitter.load(zero_sums, FLOAT, lanes))
        with emitter.loop(emitter.long(0), num_tokens, lanes) as token:
            place = builder.add(line, emitter.times(token, 4))
            score = emitter.load(place, FLOAT, lanes)
            weight = emitter.exp2(builder.fsub(score, maximum))
            is_visible = builder.fcmp_unordered(">", score, masked)  # or not a number
            weight = builder.select(is_visible, weight, emitter.constant(0.0, lanes))
            builder.store(builder.fadd(builder.load(total), weight), total)
            if value_scaling == "zero":
                zero = emitter.load(builder.add(value_zero, emitter.times(token, 2)), HALF, lanes)
                zero = emitter.half_to_float(zero)
                builder.store(emitter.fma(weight, zero, builder.load(zero_total)), zero_total)
            if value_scaling != "none":
                scale = emitter.load(builder.add(value_scale, emitter.times(token, 2)), HALF, lanes)
                weight = builder.fmul(weight, emitter.half_to_float(scale))
            if value_scaling == "scale" and centre:
                shift = emitter.constant(-centre, lanes)
                builder.store(emitter.fma(weight, shift, builder.load(zero_total)), zero_total)
            emitter.store(weight, place)
        emitter.store(builder.load(total), row_sums)
        emitter.store(builder.load(zero_total), zero_sums)
    return MachineCode("softmax", emitter.finish())


def tanh(emitter: Emitter, vector: Any) -> Any:
    """By 2 ** -|2x log2(e)|, which neither overflows nor loses the sign."""
    builder, lanes = emitter.builder, vector.type.count
    absolute = emitter.maximum(vector, builder.fneg(vector))
    power = emitter.exp2(builder.fmul(absolute, emitter.constant(-2.8853900817779268, lanes)))
    one = emitter.constant(1.0, lanes)
    result = builder.fdiv(builder.fsub(one, power), builder.fadd(one, power))
    is_negative = builder.fcmp_ordered("<", vector, emitter.constant(0.0, lanes))
    return builder.select(is_negative, builder.fneg(result), result)


@cache
def fold_kernel() -> MachineCode:
    """Fold the key scales and zero points of a block into `rows` queries.

    Arguments: queries [rows][ROW_STRIDE], rows, key_dim, number of groups, scale and zero point
    (half [groups][key_dim]), folded queries [groups][MAX_ROWS][ROW_STRIDE] and the queries' dots
    with the zero points [groups][MAX_ROWS].
    """
    lanes = min(host_width(), 8)  # dims are multiples of 8
    emitter = Emitter("fold", 8)
    queries, num_rows, key_dim, num_groups, scale, zero, folded, dots = emitter.arguments
    builder = emitter.builder
    with emitter.loop(emitter.long(0), num_groups, 1) as group:
        metadata = builder.mul(emitter.times(group, 2), key_dim)
        group_scale, group_zero = builder.add(scale, metadata), builder.add(zero, metadata)
        with emitter.loop(emitter.long(0), num_rows, 1) as row:
            source = emitter.offset(queries, emitter.times(row, ROW_STRIDE * 4))
            target_row = builder.add(emitter.times(group, MAX_ROWS), row)
            target = emitter.offset(folded, emitter.times(target_row, ROW_STRIDE * 4))
            dot = emitter.variable(emitter.constant(0.0, lanes))
            with emitter.loop(emitter.long(0), key_dim, lanes) as channel:
                at_half, at_float = emitter.times(channel, 2), emitter.times(channel, 4)
                query = emitter.load(builder.add(source, at_float), FLOAT, lanes)
                factor = emitter.load(builder.add(group_scale, at_half), HALF, lanes)
                product = builder.fmul(query, emitter.half_to_float(factor))
                emitter.store(product, builder.add(target, at_float))
                shift = emitter.load(builder.add(group_zero, at_half), HALF, lanes)
                partial = emitter.fma(query, emitter.half_to_float(shift), builder.load(dot))
                builder.store(partial, dot)
            total = emitter.reduce(builder.load(dot), builder.fadd)
            emitter.store(total, builder.add(dots, emitter.times(target_row, 4)))
    return MachineCode("fold", emitter.finish())


@cache
def widen_kernel(bits: int) -> MachineCode:
    """Behind folded queries, once more those of wide channels, for the upper part of their codes.

    Arguments: folded queries [groups][MAX_ROWS][ROW_STRIDE], rows, key_dim, number of groups, wide
    channels (64-bit), how many.
    """
    emitter = Emitter("widen", 6)
    folded, num_rows, key_dim, num_groups, wide_channels, num_wide = emitter.arguments
    builder = emitter.builder
    worth = ir.Constant(FLOAT, float(1 << bits))
    with emitter.loop(emitter.long(0), num_groups, 1) as group:
        first = emitter.offset(folded, emitter.times(group, MAX_ROWS * ROW_STRIDE * 4))
        with emitter.loop(emitter.long(0), num_wide, 1) as place:
            channel = emitter.load(emitter.offset(wide_channels, emitter.times(place, 8)), LONG)
            source = builder.add(first, emitter.times(channel, 4))
            target = builder.add(first, emitter.times(builder.add(key_dim, place), 4))
            with emitter.loop(emitter.long(0), num_rows, 1) as row:
                at_row = emitter.times(row, ROW_STRIDE * 4)
                query = emitter.load(builder.add(source, at_row), FLOAT)
                emitter.store(builder.fmul(query, worth), builder.add(target, at_row))
    return MachineCode("widen", emitter.finish())


@cache
def affine_kernel(kind: str = "float32") -> MachineCode:
    """target = (source + shift) * factor over `count` floats; the target is of `kind`.

    Arguments: source, target, count (a multiple of 8), address of shift and factor.
    """
    lanes = min(host_width(), 8)
    emitter = Emitter("affine", 4)
    source, target, count, numbers = emitter.arguments
    builder = emitter.builder
    shift = emitter.splat(emitter.load(numbers, FLOAT), lanes)
    factor = emitter.splat(emitter.load(emitter.offset(numbers, 4), FLOAT), lanes)
    with emitter.loop(emitter.long(0), count, lanes) as index:
        value = emitter.load(builder.add(source, emitter.times(index, 4)), FLOAT, lanes)
        value = builder.fmul(builder.fadd(value, shift), factor)
        at = builder.add(target, emitter.times(index, ELEMENT_BYTES[kind]))
        emitter.store(encode(emitter, value, kind), at)
    return MachineCode("affine", emitter.finish())


@cache
def start_kernel(has_softcap: bool) -> MachineCode:
    """Start the softmax of some queries with one token that all of them see.

    Arguments: queries [rows][ROW_STRIDE], rows, key [key_dim], key_dim, value [value_dim],
    value_dim, maxima [rows], sums [2][MAX_ROWS][STATE_LANES], outputs [rows][ROW_STRIDE], softcap
    address.
    """
    lanes = min(host_width(), 8)
    emitter = Emitter("start", 10)
    queries, num_rows, key, key_dim, value, value_dim, maxima, sums, outputs, softcap = (
        emitter.arguments
    )
    builder = emitter.builder
    one = ir.Constant(ir.VectorType(FLOAT, STATE_LANES), [1.0] + [0.0] * (STATE_LANES - 1))
    none = emitter.constant(0.0, STATE_LANES)
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        at_row = emitter.times(row, ROW_STRIDE * 4)
        query, output = builder.add(queries, at_row), builder.add(outputs, at_row)
        dot = emitter.variable(emitter.constant(0.0, lanes))
        with emitter.loop(emitter.long(0), key_dim, lanes) as channel:
            at = emitter.times(channel, 4)
            left, right = (emitter.load(builder.add(x, at), FLOAT, lanes) for x in (query, key))
            builder.store(emitter.fma(left, right, builder.load(dot)), dot)
        score = emitter.reduce(builder.load(dot), builder.fadd)
        if has_softcap:
            capped = tanh(emitter, emitter.splat(score, lanes))
            score = builder.extract_element(capped, ir.Constant(INT, 0))
            score = builder.fmul(score, emitter.load(softcap, FLOAT))
        emitter.store(score, builder.add(maxima, emitter.times(row, 4)))
        row_sums = emitter.offset(sums, emitter.times(row, STATE_LANES * 4))
        emitter.store(one, row_sums)
        emitter.store(none, emitter.offset(row_sums, MAX_ROWS * STATE_LANES * 4))
        with emitter.loop(emitter.long(0), value_dim, lanes) as channel:
            at = emitter.times(channel, 4)
            element = emitter.load(builder.add(value, at), FLOAT, lanes)
            emitter.store(element, builder.add(output, at))
    return MachineCode("start", emitter.finish())


@cache
def prefetch_kernel() -> MachineCode:
    """Bring `count` bytes from an address on towards the processor."""
    emitter = Emitter("prefetch", 2)
    address, count = emitter.arguments
    with emitter.loop(emitter.long(0), count, CACHE_LINE) as position:
        emitter.prefetch(emitter.builder.add(address, position))
    return MachineCode("prefetch", emitter.finish())
