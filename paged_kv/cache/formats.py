"""The KV formats and the bytes of a block record.

Knows bits, bytes and offsets, never tensors. A *record* is what one block holds for one kv head of
one layer. All records of a layer have the same size; sealed, a record holds `block_size` quantized
tokens, open, it holds `open_block_size` tokens in full precision.

Sources: KIVI (Liu et al. 2024, arXiv:2402.02750) for keys per channel and values per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from ..blocks.geometry import BlockGeometry
from ..errors import ConfigError
from ..kernels.code_bits import WIDE_BITS, lower_bits, upper_bits
from ..validation import is_finite, is_integer, require, require_count, require_instance

RECORD_ALIGNMENT: Final = 16
METADATA_BYTES: Final = 2  # scales and zero points are fp16
NATIVE_BLOCK_SIZE: Final = 16
KEY_BITS: Final = (2, 4, 8)
VALUE_BITS: Final = (2, 3, 4, 8)
WIDE_SHARES: Final = (0.0, 0.0625, 0.125, 0.25, 0.3125, 0.375, 0.5)
WIDE_ALIGNMENT: Final = 8  # wide channels, as dimensions, come in multiples of it
MAX_BLOCK_SIZE: Final = 1 << 20  # tokens, of what has no smaller limit
LEAST_SIZES: Final = {
    "block_size": -MAX_BLOCK_SIZE,  # what it may be is checked below, as of the next
    "key_group_size": -MAX_BLOCK_SIZE,
    "num_sink_tokens": 0,
    "min_tail_tokens": 0,
}


@dataclass(frozen=True, kw_only=True)
class KVFormat:
    """How the tokens of a sequence are stored.

    `key_bits` are 8, 4 or 2 bits a code, `value_bits` 8, 4, 3 or 2; or None, both, for the native
    format that never quantizes.

    Keys are quantized per channel: `key_group_size` tokens (None: the block) share a scale and a
    zero point. With `has_token_keys`, 8 bits only, each key has one scale instead, for itself. A
    share `wide_key_share` of the channels, those that matter most, has 4 bits where the others
    have 2, or 6 where they have 4. With `has_error_feedback` the error of each channel is made up
    for by those that come after it, as far as queries are expected to tell. Which channels are
    wide, and what queries are like, says a `KeyCalibration`; without one, wide channels follow a
    fixed rule, and there is no feedback.

    Values are quantized per token, with a scale and, below 8 bits, a zero point. With
    `rotates_values` they are stored multiplied by a Hadamard matrix, which spreads what stands out
    over all channels: they need no zero point then.

    `key_clip`, `wide_key_clip` and `value_clip` shrink each min-max range about its middle before
    quantizing; 1.0 is the faithful min-max of KIVI. The first `num_sink_tokens`, rounded up to
    whole open blocks, stay in full precision for life, and so do at least the newest
    `min_tail_tokens`.
    """

    name: str
    key_bits: int | None
    value_bits: int | None
    has_token_keys: bool = False
    wide_key_share: float = 0.0
    has_error_feedback: bool = False
    rotates_values: bool = False
    block_size: int = 128
    key_group_size: int | None = None
    key_clip: float = 1.0
    wide_key_clip: float = 1.0
    value_clip: float = 1.0
    num_sink_tokens: int = 4
    min_tail_tokens: int = 32

    def __post_init__(self) -> None:
        require("name", self.name, isinstance(self.name, str), "a string")
        for setting in ("has_token_keys", "has_error_feedback", "rotates_values"):
            require_instance(setting, getattr(self, setting), bool)
        for setting in ("key_clip", "wide_key_clip", "value_clip"):  # equal formats look equal
            clip = getattr(self, setting)
            require(setting, clip, is_finite(clip) and 0 < clip <= 1, "in (0, 1]")
            object.__setattr__(self, setting, float(clip))
        for setting, least in LEAST_SIZES.items():
            if getattr(self, setting) is not None or setting != "key_group_size":
                size = require_count(setting, getattr(self, setting), least, MAX_BLOCK_SIZE)
                object.__setattr__(self, setting, size)
        for setting, known in (("key_bits", KEY_BITS), ("value_bits", VALUE_BITS)):
            bits = getattr(self, setting)
            is_known = bits is None or (is_integer(bits) and bits in known)
            require(setting, bits, is_known, f"{', '.join(map(str, known))} or None")
            object.__setattr__(self, setting, bits if bits is None else int(bits))
        if (self.key_bits is None) != (self.value_bits is None):
            raise ConfigError(
                f"key_bits {self.key_bits} and value_bits {self.value_bits}: native is both None"
            )
        if self.is_native:
            is_power = self.block_size >= 1 and not self.block_size & (self.block_size - 1)
            require("block_size", self.block_size, is_power, "a power of two")
        elif self.block_size not in (64, 128):
            raise ConfigError(f"block_size must be 64 or 128, got {self.block_size}")
        elif self.value_bits == 3 and self.block_size != 128:
            raise ConfigError(f"value_bits 3 need a block_size of 128, got {self.block_size}")
        self._check_keys()

    def _check_keys(self) -> None:
        size, share = self.key_group_size, self.wide_key_share
        if size is not None and not self.is_native:
            if size not in (32, 64, 128) or size > self.block_size:
                raise ConfigError(
                    "key_group_size must be 32, 64 or 128 and at most block_size "
                    f"({self.block_size}), got {size}"
                )
            if size == self.block_size:  # equal formats look equal
                object.__setattr__(self, "key_group_size", None)
        is_share = is_finite(share) and share in WIDE_SHARES
        require("wide_key_share", share, is_share, f"one of {WIDE_SHARES}")
        object.__setattr__(self, "wide_key_share", float(share))
        if share and self.key_bits not in (2, 4):
            raise ConfigError(
                f"wide_key_share {share} gives channels {WIDE_BITS} bits more than key_bits, which "
                f"must be 2 or 4 then, and is {self.key_bits}"
            )
        if self.has_token_keys and (self.key_bits != 8 or size is not None):
            raise ConfigError(
                f"has_token_keys needs key_bits 8 and no key_group_size, got {self.key_bits} and "
                f"{size}"
            )
        if self.has_error_feedback and (self.is_native or self.has_token_keys):
            raise ConfigError("has_error_feedback is for keys that are quantized per channel")
        if self.rotates_values and self.is_native:
            raise ConfigError("rotates_values is for values that are quantized")

    @property
    def is_native(self) -> bool:
        return self.key_bits is None

    @property
    def num_key_groups(self) -> int:
        """Key scales per channel and block; 0 where keys have one scale for themselves."""
        if self.has_token_keys:
            return 0
        return self.block_size // (self.key_group_size or self.block_size)

    def num_wide_channels(self, key_dim: int) -> int:
        """Of the channels of a key, those with more bits than others."""
        steps = math.ceil(self.wide_key_share * key_dim / WIDE_ALIGNMENT)
        return min(steps * WIDE_ALIGNMENT, key_dim)

    @property
    def wants_calibration(self) -> bool:
        """Whether a `KeyCalibration` changes what is stored."""
        return self.has_error_feedback or self.wide_key_share > 0

    def with_options(self, **changes: int | float | bool | None) -> KVFormat:
        """The same format with some fields changed: `INT2.with_options(key_clip=1.0)`."""
        unknown = set(changes) - {field.name for field in fields(self)}
        if unknown:
            raise ConfigError(f"a KVFormat has no {', '.join(sorted(unknown))}")
        return replace(self, **changes)  # type: ignore[arg-type]


NATIVE: Final = KVFormat(
    name="native",
    key_bits=None,
    value_bits=None,
    block_size=NATIVE_BLOCK_SIZE,
    num_sink_tokens=0,
    min_tail_tokens=0,
)
INT8: Final = KVFormat(name="int8", key_bits=8, value_bits=8, block_size=64, min_tail_tokens=0)
INT8_TOKEN: Final = KVFormat(
    name="int8-token", key_bits=8, value_bits=8, has_token_keys=True, min_tail_tokens=0
)
# Clip ratios, sizes of blocks and of tails with the least divergence a byte on a real model, those
# of short sequences included; see bench/NOTES.md.
INT4: Final = KVFormat(
    name="int4",
    key_bits=4,
    value_bits=4,
    wide_key_share=0.0625,
    has_error_feedback=True,
    rotates_values=True,
    key_clip=0.95,
    value_clip=0.95,
)
K4V2: Final = replace(
    INT4, name="k4v2", value_bits=2, wide_key_share=0.0, key_clip=1.0, value_clip=0.8
)
INT2: Final = KVFormat(
    name="int2",
    key_bits=2,
    value_bits=2,
    wide_key_share=0.25,
    has_error_feedback=True,
    rotates_values=True,
    block_size=64,
    key_clip=0.8,
    value_clip=0.85,
    min_tail_tokens=24,
)
# For long sequences: twice the block leaves room for more wide channels, but has a tail
# of up to 159 tokens.
INT2_LONG: Final = replace(
    INT2,
    name="int2-long",
    wide_key_share=0.3125,
    block_size=128,
    wide_key_clip=0.95,
    min_tail_tokens=32,
)
# As many bytes as `K4V2`, better spent: with wide channels keys take 3 bits a code, as values do.
INT3: Final = replace(INT2_LONG, name="int3", value_bits=3, wide_key_share=0.5)
# KIVI as published: groups of 32 tokens, no clipping, the newest 128 tokens in full precision.
KIVI2: Final = KVFormat(
    name="kivi2",
    key_bits=2,
    value_bits=2,
    key_group_size=32,
    num_sink_tokens=0,
    min_tail_tokens=128,
)
FORMATS: Final = {
    kv_format.name: kv_format
    for kv_format in (NATIVE, INT8, INT8_TOKEN, INT4, K4V2, INT3, INT2, INT2_LONG, KIVI2)
}

SIZED_NAME: Final = re.compile(r"(?P<name>[^@/]*)(?P<sizes>.*)", re.DOTALL)
SIZES: Final = re.compile(r"(?:@(?P<block_size>[0-9]{1,9}))?(?:/(?P<num_sink_tokens>[0-9]{1,9}))?")


def resolve_format(kv_format: str | KVFormat) -> KVFormat:
    """The format of that name, or the given format itself.

    "int8@128" has blocks of 128 tokens, "int8/0" no first tokens in full precision, "int8@128/0"
    both.
    """
    if isinstance(kv_format, KVFormat):
        return kv_format
    parts = SIZED_NAME.fullmatch(kv_format) if isinstance(kv_format, str) else None
    if parts is None or parts["name"] not in FORMATS:
        raise ConfigError(f"unknown KV format {kv_format!r}; expected one of {', '.join(FORMATS)}")
    found = FORMATS[parts["name"]]
    if not parts["sizes"]:
        return found
    sizes = SIZES.fullmatch(parts["sizes"])
    if sizes is None:
        raise ConfigError(
            f"KV format {kv_format!r} must be a format@tokens of a block, a format/first tokens "
            "that it keeps, or both in this order, as in int8@128/0"
        )
    try:
        return found.with_options(**{name: int(n) for name, n in sizes.groupdict().items() if n})
    except ConfigError as error:
        raise ConfigError(f"KV format {kv_format!r}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Byte offsets inside one record, for one kv head of one layer.

    Sealed: key codes, upper bits of wide channels, value codes, upper bits of values of 3, key
    scales, key zero points, value scales, value zero points. Open: `open_capacity` keys, then as
    many values, in full precision.
    """

    kv_format: KVFormat
    key_dim: int
    value_dim: int
    itemsize: int  # bytes of one full-precision element

    def __post_init__(self) -> None:
        for name, size in (("key_dim", self.key_dim), ("value_dim", self.value_dim)):
            fits = is_integer(size) and size % 8 == 0 and 8 <= size <= 256
            require(name, size, fits, "a multiple of 8 from 8 to 256")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in full precision."""
        return (self.key_dim + self.value_dim) * self.itemsize

    @property
    def code_shapes(self) -> dict[str, tuple[int, int]]:
        """Rows and channels of the code matrices: a row is a byte row, a token of every plane."""
        kv_format = self.kv_format
        if kv_format.key_bits is None or kv_format.value_bits is None:
            return {}
        num_wide, value_bits = kv_format.num_wide_channels(self.key_dim), kv_format.value_bits
        bits_and_channels = {
            "key_codes": (kv_format.key_bits, self.key_dim),
            "wide_codes": (WIDE_BITS, num_wide),
            "value_codes": (lower_bits(value_bits), self.value_dim),
            "upper_value_codes": (upper_bits(value_bits), self.value_dim),
        }
        return {
            name: (kv_format.block_size * bits // 8, channels)
            for name, (bits, channels) in bits_and_channels.items()
            if bits * channels
        }

    @property
    def metadata_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of scales and zero points."""
        kv_format = self.kv_format
        if kv_format.is_native:
            return {}
        shapes: dict[str, tuple[int, ...]] = {"key_scale": (kv_format.block_size,)}
        if not kv_format.has_token_keys:
            by_channel = kv_format.num_key_groups, self.key_dim
            shapes = {"key_scale": by_channel, "key_zero": by_channel}
        shapes["value_scale"] = (kv_format.block_size,)
        if kv_format.value_bits != 8 and not kv_format.rotates_values:
            shapes["value_zero"] = (kv_format.block_size,)
        return shapes

    @property
    def section_bytes(self) -> dict[str, int]:
        """Size of each section of a sealed record, in order."""
        if self.kv_format.is_native:
            return {"keys_and_values": self.token_bytes * self.kv_format.block_size}
        codes = {name: math.prod(shape) for name, shape in self.code_shapes.items()}
        metadata = {
            name: math.prod(shape) * METADATA_BYTES for name, shape in self.metadata_shapes.items()
        }
        return codes | metadata

    def offset(self, section: str) -> int:
        """Byte offset of a section of a sealed record."""
        position = 0
        for name, size in self.section_bytes.items():
            if name == section:
                return position
            position += size
        raise KeyError(section)

    @property
    def record_bytes(self) -> int:
        size = sum(self.section_bytes.values())
        return -(-size // RECORD_ALIGNMENT) * RECORD_ALIGNMENT

    @property
    def open_capacity(self) -> int:
        """The largest power of two of full-precision tokens that fits the record."""
        tokens = self.record_bytes // self.token_bytes
        return 1 << (tokens.bit_length() - 1)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one sealed token (native: of one token) for one kv head."""
        return self.record_bytes / self.kv_format.block_size


def block_geometry(layouts: Sequence[RecordLayout]) -> BlockGeometry:
    """The one geometry whose block table serves all these layers."""
    first = layouts[0].kv_format
    for layout in layouts:
        other = layout.kv_format
        same = (
            other.block_size == first.block_size
            and other.num_sink_tokens == first.num_sink_tokens
            and other.min_tail_tokens == first.min_tail_tokens
        )
        if not same:
            raise ConfigError(
                "layers that share a block table must agree on block_size, num_sink_tokens and "
                f"min_tail_tokens; got {first} and {other}"
            )
    open_block_size = min(layout.open_capacity for layout in layouts)
    num_head_blocks = -(-first.num_sink_tokens // open_block_size)
    return BlockGeometry(
        block_size=first.block_size,
        open_block_size=open_block_size,
        num_head_tokens=num_head_blocks * open_block_size,
        min_tail_tokens=first.min_tail_tokens,
    )
