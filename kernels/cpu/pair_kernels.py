"""The inner loops of attention for many query rows, by products of pairs of bfloat16.

Knows addresses and element kinds, nothing of tables or sequences. Keys and values of a tile of
tokens are first laid as the instruction wants them: two channels of a token, or two tokens of a
channel, beside each other. Each is read by many rows, so that this costs little; and sealed blocks
then are as any others. Rows of scratch have fixed strides.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import gcd
from typing import Any, Final

from llvmlite import ir

from .dense_kernels import multiply_pairs
from .elements import ELEMENT_BYTES, NUM_PLANES, decode, encode, load_raw
from .microkernels import MAX_DIM, MAX_ROWS, ROW_STRIDE, SCORE_STRIDE, TILE_TOKENS
from .vectors import FLOAT, HALF, INT, LONG, SHORT, Emitter, MachineCode

LANES: Final = 16  # where there are pairs, vectors have 512 bits
ROWS_AT_ONCE: Final = 4  # with four vectors: as many sums as hide the latency
VECTORS_AT_ONCE: Final = 4
QUERY_BYTES: Final = 2 * MAX_DIM  # of a row of queries
WEIGHT_BYTES: Final = 2 * TILE_TOKENS  # of a row of weights
KEY_PAIR_BYTES: Final = 4 * TILE_TOKENS  # of two channels of a tile's tokens
FLOAT_KEY_BYTES: Final = 4 * TILE_TOKENS  # of a channel, before it is rounded


def rounded(emitter: Emitter, floats: Any) -> Any:
    """Floats as bfloat16."""
    if floats.type.count != LANES:
        return encode(emitter, floats, "bfloat16")
    kind = ir.VectorType(SHORT, LANES)
    return emitter.call("llvm.x86.avx512bf16.cvtneps2bf16.512", kind, floats)


def paired(emitter: Emitter, raw: Sequence[Any], kind: str) -> Any:
    """Two vectors of elements, as lanes of two bfloat16 each."""
    builder, lanes = emitter.builder, raw[0].type.count
    ints = ir.VectorType(INT, lanes)
    if kind != "bfloat16":
        raw = [rounded(emitter, decode(emitter, each, kind)[0]) for each in raw]
    low, high = (builder.zext(each, ints) for each in raw)
    return builder.or_(low, builder.shl(high, emitter.integers(16, INT, lanes)))


@cache
def pair_keys_kernel(kind: str, lanes: int) -> MachineCode:
    """Keys, channel by channel, as pairs [key_dim / 2][TILE_TOKENS].

    Arguments: keys, bytes from channel to channel, pairs, key_dim, number of tokens (as many more
    are read as a vector of `lanes` needs).
    """
    emitter = Emitter("pair_keys", 5)
    keys, stride, pairs, key_dim, num_tokens = emitter.arguments
    builder = emitter.builder
    with emitter.loop(emitter.long(0), key_dim, 2) as channel:
        first = builder.add(keys, builder.mul(channel, stride))
        second = builder.add(first, stride)
        target = builder.add(pairs, emitter.times(channel, KEY_PAIR_BYTES // 2))
        with emitter.loop(emitter.long(0), num_tokens, lanes) as token:
            at = emitter.times(token, ELEMENT_BYTES[kind])
            raw = [
                load_raw(emitter, builder.add(each, at), kind, lanes) for each in (first, second)
            ]
            emitter.store(paired(emitter, raw, kind), builder.add(target, emitter.times(token, 4)))
    return MachineCode("pair_keys", emitter.finish())


@cache
def pair_values_kernel(kind: str, value_dim: int) -> MachineCode:
    """Values, token by token, as pairs [tokens / 2][value_dim]; beside the last of an odd number 0.

    Arguments: values, bytes from token to token, pairs, number of tokens.
    """
    emitter = Emitter("pair_values", 4)
    values, stride, pairs, num_tokens = emitter.arguments
    builder = emitter.builder
    even = builder.and_(num_tokens, emitter.long(-2))

    def lay(token: Any, *, is_last: bool) -> None:
        first = builder.add(values, builder.mul(token, stride))
        target = builder.add(pairs, emitter.times(token, 2 * value_dim))
        for channel in range(0, value_dim, LANES):
            at = emitter.offset(first, channel * ELEMENT_BYTES[kind])
            raw = [load_raw(emitter, at, kind, LANES)]
            if is_last:
                raw.append(ir.Constant(raw[0].type, None))
            else:
                raw.append(load_raw(emitter, builder.add(at, stride), kind, LANES))
            emitter.store(paired(emitter, raw, kind), emitter.offset(target, channel * 4))

    with emitter.loop(emitter.long(0), even, 2) as token:
        lay(token, is_last=False)
    with emitter.loop(even, num_tokens, 2) as token:
        lay(token, is_last=True)
    return MachineCode("pair_values", emitter.finish())


@cache
def pair_rows_kernel(source_bytes: int, target_bytes: int) -> MachineCode:
    """Floats as bfloat16: queries, and weights. Strides from row to row are in bytes.

    Arguments: source, target, number of rows, number of floats (as many more as a vector needs).
    """
    emitter = Emitter("pair_rows", 4)
    source, target, num_rows, count = emitter.arguments
    builder = emitter.builder
    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        line = builder.add(source, emitter.times(row, source_bytes))
        output = builder.add(target, emitter.times(row, target_bytes))
        with emitter.loop(emitter.long(0), count, LANES) as index:
            floats = emitter.load(builder.add(line, emitter.times(index, 4)), FLOAT, LANES)
            emitter.store(rounded(emitter, floats), builder.add(output, emitter.times(index, 2)))
    return MachineCode("pair_rows", emitter.finish())


def multiply(
    emitter: Emitter,
    count: Any,
    left: tuple[Any, int],
    right: tuple[Any, int],
    sums: Sequence[Sequence[Any]],
) -> Sequence[Sequence[Any]]:
    """Add to sums [rows][vectors] the products of `count` pairs of each.

    Left is rows of pairs, given by address and bytes from row to row; right is, for each pair,
    vectors, given by address and bytes from pair to pair.
    """
    builder, places = emitter.builder, [[emitter.variable(one) for one in row] for row in sums]
    with emitter.loop(emitter.long(0), count, 1) as pair:
        line = builder.add(right[0], emitter.times(pair, right[1]))
        kind = ir.VectorType(SHORT, 2 * LANES)
        vectors = [
            emitter.load(emitter.offset(line, 4 * LANES * index), SHORT, 2 * LANES)
            for index in range(len(sums[0]))
        ]
        for row, row_places in enumerate(places):
            at = emitter.offset(left[0], emitter.times(pair, 4), row * left[1])
            both = builder.bitcast(emitter.splat(emitter.load(at, INT), LANES), kind)
            for vector, place in zip(vectors, row_places, strict=True):
                total = multiply_pairs(emitter, both, vector, builder.load(place))
                builder.store(total, place)
    return [[builder.load(place) for place in row] for row in places]


@cache
def pair_scores_kernel() -> MachineCode:
    """Scores [MAX_ROWS][SCORE_STRIDE] of queries [MAX_ROWS][MAX_DIM] with a tile of keys.

    Arguments: queries, keys in pairs, scores, number of pairs, number of tokens (as many more as
    four vectors need), address of a factor.
    """
    emitter = Emitter("pair_scores", 6)
    queries, keys, scores, num_pairs, num_tokens, at_factor = emitter.arguments
    builder = emitter.builder
    factor = emitter.splat(emitter.load(at_factor, FLOAT), LANES)
    zero = emitter.constant(0.0, LANES)
    with emitter.loop(emitter.long(0), num_tokens, VECTORS_AT_ONCE * LANES) as token:
        right = builder.add(keys, emitter.times(token, 4)), KEY_PAIR_BYTES
        for first in range(0, MAX_ROWS, ROWS_AT_ONCE):
            left = emitter.offset(queries, first * QUERY_BYTES), QUERY_BYTES
            sums = multiply(
                emitter, num_pairs, left, right, [[zero] * VECTORS_AT_ONCE] * ROWS_AT_ONCE
            )
            target = emitter.offset(scores, emitter.times(token, 4))
            for row, vectors in enumerate(sums):
                for index, vector in enumerate(vectors):
                    place = (first + row) * SCORE_STRIDE * 4 + 4 * LANES * index
                    product = builder.fmul(vector, factor)
                    emitter.store(product, emitter.offset(target, place))
    return MachineCode("pair_scores", emitter.finish())


@cache
def pair_sums_kernel(value_dim: int) -> MachineCode:
    """Add the weighted values of a tile to outputs [MAX_ROWS][ROW_STRIDE].

    Arguments: weights [MAX_ROWS][TILE_TOKENS], values in pairs, outputs, number of pairs.
    """
    emitter = Emitter("pair_sums", 4)
    weights, values, outputs, num_pairs = emitter.arguments
    for channel in range(0, value_dim, VECTORS_AT_ONCE * LANES):
        count = min(VECTORS_AT_ONCE, (value_dim - channel) // LANES)
        right = emitter.offset(values, 4 * channel), 4 * value_dim
        for first in range(0, MAX_ROWS, ROWS_AT_ONCE):
            places = [
                [
                    emitter.offset(outputs, 4 * ((first + row) * ROW_STRIDE + channel + LANES * n))
                    for n in range(count)
                ]
                for row in range(ROWS_AT_ONCE)
            ]
            before = [[emitter.load(at, FLOAT, LANES) for at in row] for row in places]
            left = emitter.offset(weights, first * WEIGHT_BYTES), WEIGHT_BYTES
            sums = multiply(emitter, num_pairs, left, right, before)
            for row_places, vectors in zip(places, sums, strict=True):
                for at, vector in zip(row_places, vectors, strict=True):
                    emitter.store(vector, at)
    return MachineCode("pair_sums", emitter.finish())


# -- sealed blocks as floats ----------------------------------------------------------------------


@cache
def float_keys_kernel(kind: str, num_token_rows: int, num_groups: int) -> MachineCode:
    """Keys of a sealed block as floats [key_dim][TILE_TOKENS].

    Arguments: codes, scale, zero point (half [groups][key_dim]; without groups a scale for each
    token and no zero point), floats, key_dim.
    """
    lanes, planes = gcd(LANES, num_token_rows), NUM_PLANES[kind]
    emitter = Emitter("float_keys", 5)
    codes, scale, zero, floats, key_dim = emitter.arguments
    builder = emitter.builder
    group_tokens = num_token_rows * planes // max(num_groups, 1)

    def half_at(base: Any, index: Any) -> Any:
        value = emitter.load(builder.add(base, emitter.times(index, 2)), HALF)
        return emitter.splat(builder.fpext(value, FLOAT), lanes)

    with emitter.loop(emitter.long(0), key_dim, 1) as channel:
        line = builder.add(codes, emitter.times(channel, num_token_rows))
        target = builder.add(floats, emitter.times(channel, FLOAT_KEY_BYTES))
        numbers = [
            [half_at(base, emitter.offset(builder.mul(key_dim, emitter.long(group)), channel))
             for base in (scale, zero)]
            for group in range(num_groups)
        ]  # fmt: skip
        for row in range(0, num_token_rows, lanes):
            raw = load_raw(emitter, emitter.offset(line, row), kind, lanes)
            for plane, vector in enumerate(decode(emitter, raw, kind)):
                token = plane * num_token_rows + row
                if num_groups:
                    vector = emitter.fma(vector, *numbers[token // group_tokens])
                else:
                    halves = emitter.load(emitter.offset(scale, 2 * token), HALF, lanes)
                    vector = builder.fmul(vector, emitter.half_to_float(halves))
                emitter.store(vector, emitter.offset(target, 4 * token))
    return MachineCode("float_keys", emitter.finish())


@cache
def wide_keys_kernel(kind: str, bits: int, num_token_rows: int, num_groups: int) -> MachineCode:
    """To floats of keys, what the upper bits of wide channels are worth.

    Arguments: upper codes, scale, floats, key_dim, wide channels (64-bit), how many.
    """
    lanes, planes = gcd(LANES, num_token_rows), NUM_PLANES[kind]
    emitter = Emitter("wide_keys", 6)
    codes, scale, floats, key_dim, wide_channels, num_wide = emitter.arguments
    builder = emitter.builder
    group_tokens = num_token_rows * planes // num_groups
    worth = ir.Constant(FLOAT, float(1 << bits))
    with emitter.loop(emitter.long(0), num_wide, 1) as place:
        channel = emitter.load(builder.add(wide_channels, emitter.times(place, 8)), LONG)
        line = builder.add(codes, emitter.times(place, num_token_rows))
        target = builder.add(floats, emitter.times(channel, FLOAT_KEY_BYTES))
        factors = []
        for group in range(num_groups):
            index = emitter.offset(builder.mul(key_dim, emitter.long(group)), channel)
            value = emitter.load(builder.add(scale, emitter.times(index, 2)), HALF)
            factor = builder.fmul(builder.fpext(value, FLOAT), worth)
            factors.append(emitter.splat(factor, lanes))
        for row in range(0, num_token_rows, lanes):
            raw = load_raw(emitter, emitter.offset(line, row), kind, lanes)
            for plane, vector in enumerate(decode(emitter, raw, kind)):
                token = plane * num_token_rows + row
                at = emitter.offset(target, 4 * token)
                before = emitter.load(at, FLOAT, lanes)
                emitter.store(emitter.fma(vector, factors[token // group_tokens], before), at)
    return MachineCode("wide_keys", emitter.finish())


@cache
def float_values_kernel(
    kind: str, value_dim: int, shift: int, scaling: str, centre: float
) -> MachineCode:
    """Values of a sealed block as floats [tokens][value_dim]; with a `shift`, added to those.

    Arguments: codes, scale, zero point (half [tokens]), floats, number of code rows. `scaling` and
    `centre` as in `softmax_kernel`, codes as in `decode`.
    """
    emitter = Emitter("float_values", 5)
    codes, scale, zero, floats, num_rows = emitter.arguments
    builder = emitter.builder

    def half_at(base: Any, token: Any) -> Any:
        value = emitter.load(builder.add(base, emitter.times(token, 2)), HALF)
        return builder.fpext(value, FLOAT)

    with emitter.loop(emitter.long(0), num_rows, 1) as row:
        line = builder.add(codes, emitter.times(row, value_dim))
        for channel in range(0, value_dim, LANES):
            raw = load_raw(emitter, emitter.offset(line, channel), kind, LANES)
            for plane, vector in enumerate(decode(emitter, raw, kind, shift)):
                token = builder.add(row, builder.mul(num_rows, emitter.long(plane)))
                factor = half_at(scale, token)
                at = builder.add(floats, emitter.times(token, 4 * value_dim))
                at = emitter.offset(at, 4 * channel)
                if shift:
                    offset = emitter.load(at, FLOAT, LANES)
                elif scaling == "zero":
                    offset = emitter.splat(half_at(zero, token), LANES)
                else:
                    least = builder.fmul(factor, ir.Constant(FLOAT, -centre))
                    offset = emitter.splat(least, LANES)
                emitter.store(emitter.fma(vector, emitter.splat(factor, LANES), offset), at)
    return MachineCode("float_values", emitter.finish())
