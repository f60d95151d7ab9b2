"""The KV formats and the bytes of a block record.

Knows bits, bytes and offsets, never tensors. A *record* is what one block holds for one kv head of
one layer. All records of a layer have the same size; sealed, a record holds `block_size` quantized
tokens, open, it holds `open_block_size` tokens in full precision.

Sources: KIVI (Liu et al. 2024, arXiv:2402.02750) for keys per channel and values per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

from ..blocks.geometry import BlockGeometry
from ..errors import ConfigError
from ..validation import is_finite, is_integer, require, require_count

RECORD_ALIGNMENT: Final = 16
METADATA_BYTES: Final = 2  # scales and zero points are fp16
NATIVE_BLOCK_SIZE: Final = 16
QUANTIZED_BITS: Final = (2, 4, 8)
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

    `bits` is 8, 4 or 2 bits a code, or None for the native format that never quantizes.
    `key_group_size` tokens share one key scale and zero point per channel (2 and 4 bits only).
    `key_clip` and `value_clip` shrink each min-max range about its middle before quantizing; 1.0
    is the faithful min-max of KIVI. The first `num_sink_tokens`, rounded up to whole open blocks,
    stay in full precision for life, and so do at least the newest `min_tail_tokens`.
    """

    name: str
    bits: int | None
    block_size: int = 128
    key_group_size: int = 128
    key_clip: float = 1.0
    value_clip: float = 1.0
    num_sink_tokens: int = 4
    min_tail_tokens: int = 32

    def __post_init__(self) -> None:
        require("name", self.name, isinstance(self.name, str), "a string")
        for setting in ("key_clip", "value_clip"):  # equal formats look equal
            clip = getattr(self, setting)
            require(setting, clip, is_finite(clip) and 0 < clip <= 1, "in (0, 1]")
            object.__setattr__(self, setting, float(clip))
        for setting, least in LEAST_SIZES.items():
            size = require_count(setting, getattr(self, setting), least, MAX_BLOCK_SIZE)
            object.__setattr__(self, setting, size)
        is_known = self.bits is None or (is_integer(self.bits) and self.bits in QUANTIZED_BITS)
        require("bits", self.bits, is_known, "2, 4, 8 or None")
        if self.bits is None:
            is_power = self.block_size >= 1 and not self.block_size & (self.block_size - 1)
            require("block_size", self.block_size, is_power, "a power of two")
            return
        object.__setattr__(self, "bits", int(self.bits))
        if self.block_size not in (64, 128):
            raise ConfigError(f"block_size must be 64 or 128, got {self.block_size}")
        if self.key_group_size not in (32, 64, 128) or self.key_group_size > self.block_size:
            raise ConfigError(
                "key_group_size must be 32, 64 or 128 and at most block_size "
                f"({self.block_size}), got {self.key_group_size}"
            )

    @property
    def is_native(self) -> bool:
        return self.bits is None

    @property
    def is_asymmetric(self) -> bool:
        """True where keys are quantized per channel with zero points (2 and 4 bits)."""
        return self.bits in (2, 4)

    @property
    def codes_per_byte(self) -> int:
        assert self.bits is not None
        return 8 // self.bits

    @property
    def num_key_groups(self) -> int:
        """Key scales per channel and block."""
        return self.block_size // self.key_group_size

    def with_options(self, **changes: int | float) -> KVFormat:
        """The same format with some fields changed: `INT2.with_options(key_clip=1.0)`."""
        unknown = set(changes) - {field.name for field in fields(self)}
        if unknown:
            raise ConfigError(f"a KVFormat has no {', '.join(sorted(unknown))}")
        return replace(self, **changes)  # type: ignore[arg-type]


NATIVE: Final = KVFormat(
    name="native", bits=None, block_size=NATIVE_BLOCK_SIZE, num_sink_tokens=0, min_tail_tokens=0
)
INT8: Final = KVFormat(name="int8", bits=8, min_tail_tokens=0)
INT4: Final = KVFormat(name="int4", bits=4)
# The clip ratios with the least divergence on the demo model; see bench/NOTES.md.
INT2: Final = KVFormat(name="int2", bits=2, key_clip=0.75, value_clip=0.8)
FORMATS: Final = {f.name: f for f in (NATIVE, INT8, INT4, INT2)}


def resolve_format(kv_format: str | KVFormat) -> KVFormat:
    """The format of that name, or the given format itself."""
    if isinstance(kv_format, KVFormat):
        return kv_format
    if not isinstance(kv_format, str) or kv_format not in FORMATS:
        raise ConfigError(f"unknown KV format {kv_format!r}; expected one of {', '.join(FORMATS)}")
    return FORMATS[kv_format]


@dataclass(frozen=True, kw_only=True)
class RecordLayout:
    """Byte offsets inside one record, for one kv head of one layer.

    Sealed: key codes, value codes, key scales, key zero points, value scales, value zero points.
    Open: `open_capacity` keys, then as many values, in full precision.
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
    def num_code_rows(self) -> int:
        """Rows of the code matrices: each byte row holds one token of every plane."""
        return self.kv_format.block_size // self.kv_format.codes_per_byte

    @property
    def section_bytes(self) -> dict[str, int]:
        """Size of each section of a sealed record, in order."""
        if self.kv_format.is_native:
            return {"keys_and_values": self.token_bytes * self.kv_format.block_size}
        per_token = self.kv_format.block_size * METADATA_BYTES
        sections = {
            "key_codes": self.num_code_rows * self.key_dim,
            "value_codes": self.num_code_rows * self.value_dim,
        }
        if not self.kv_format.is_asymmetric:
            return sections | {"key_scale": per_token, "value_scale": per_token}
        per_channel = self.kv_format.num_key_groups * self.key_dim * METADATA_BYTES
        return sections | {
            "key_scale": per_channel,
            "key_zero": per_channel,
            "value_scale": per_token,
            "value_zero": per_token,
        }

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
            other.is_native == first.is_native
            and other.block_size == first.block_size
            and other.num_sink_tokens == first.num_sink_tokens
            and other.min_tail_tokens == first.min_tail_tokens
        )
        if not same:
            raise ConfigError(
                "layers that share a block table must agree on block_size, num_sink_tokens and "
                f"min_tail_tokens, and be all native or all quantized; got {first} and {other}"
            )
    open_block_size = min(layout.open_capacity for layout in layouts)
    if first.is_native:
        open_block_size = first.block_size
    num_head_blocks = -(-first.num_sink_tokens // open_block_size)
    return BlockGeometry(
        block_size=first.block_size,
        open_block_size=open_block_size,
        num_head_tokens=num_head_blocks * open_block_size,
        min_tail_tokens=first.min_tail_tokens,
    )
