"""Keys and values of a chunk of tokens as bytes, quantized as blocks are: for stores of others.

Knows tensors and a wire format, never who stores the bytes. A chunk is [2, layers, tokens, kv heads
* head_dim], as LMCache has it, from anywhere in a prompt. Integers are little-endian:

    frame     magic, version (u32), bytes of the header (u32), bytes of everything (u64)
    header    JSON: what both sides must agree on, and the name of the chunk
    layers    one behind the other, each: sealed records [blocks, kv heads, record_bytes], then the
              tokens that are in none of them, [2, tokens, kv heads * head_dim] in full precision
    checksum  SHA-256 of everything before it

Whole blocks of a chunk are sealed, from its first token on. What does not fill a block stays in
full precision, and so do the first tokens, as a chunk may be the first of its prompt, whose first
tokens have keys like no others: in their block stands the token behind them instead. Nothing is
told of when these bytes were made, so equal chunks are equal bytes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from struct import Struct
from threading import Lock
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..blocks.block_tables import StoredLengths
from ..cache.attention import store_tokens
from ..cache.formats import KVFormat
from ..cache.kv_cache import PagedKVCache
from ..cache.layer_formats import KVFormats, formats_name, resolve_formats
from ..cache.layer_spec import FULL_PRECISION_DTYPES, LayerSpec
from ..cache.stored_context import StoredContext
from ..errors import ConfigError, TransferError
from ..models.calibration import Calibration
from ..validation import require, require_count

MAGIC: Final = b"paged_kc"
VERSION: Final = 1
FRAME: Final = Struct("<8sIIQ")
DIGEST_BYTES: Final = 32


@dataclass(frozen=True)
class ChunkShape:
    """[2, layers, tokens, hidden size], and in which precision."""

    num_layers: int
    num_tokens: int
    hidden_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype) -> ChunkShape:
        """Raises `ConfigError` for what is no chunk of keys and values."""
        if len(shape) != 4 or shape[0] != 2 or not all(size >= 1 for size in shape):
            raise ConfigError(
                f"a chunk must be [2, layers, tokens, kv heads * head_dim], got {tuple(shape)}"
            )
        require("dtype", dtype, dtype in FULL_PRECISION_DTYPES, "float32, bfloat16 or float16")
        return cls(int(shape[1]), int(shape[2]), int(shape[3]), dtype)

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in one layer, in full precision."""
        return 2 * self.hidden_size * self.dtype.itemsize


class ChunkCodec:
    """Turns chunks of one model into bytes and back; several threads may use one.

    `kv_format` is as for `LLM`, by layer where it says so. `calibration` is one of `paged-kv
    calibrate`, or its file, of the same model. The first `num_sink_tokens` of every chunk stay in
    full precision too; without it as many as the format says.
    """

    def __init__(
        self,
        kv_format: KVFormats = "int8",
        *,
        head_dim: int,
        calibration: Calibration | str | Path | None = None,
        num_sink_tokens: int | None = None,
    ) -> None:
        self._formats: Final = resolve_formats(kv_format)
        self._head_dim: Final = require_count("head_dim", head_dim)
        if isinstance(calibration, (str, Path)):
            calibration = Calibration.load(calibration)
        self._calibration: Final = calibration
        if num_sink_tokens is not None:
            num_sink_tokens = require_count("num_sink_tokens", num_sink_tokens, least=0)
        self._num_sinks: Final = num_sink_tokens
        self._chunks: dict[ChunkShape, _Chunk] = {}
        self._lock = Lock()

    def num_bytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Bytes of every encoded chunk of that shape."""
        return self._chunk(ChunkShape.of(shape, dtype)).num_bytes

    def encode(self, kv: Tensor, name: bytes = b"") -> bytes:
        """The bytes of a chunk; whoever decodes them has to give the same `name`.

        Raises `ConfigError` for what cannot be encoded, as for K/V that are not finite.
        """
        chunk = self._chunk(ChunkShape.of(kv.shape, kv.dtype))
        if not bool(torch.isfinite(kv).all()):
            raise ConfigError("the K/V of the chunk are not all finite")
        with self._lock:
            return chunk.encode(kv.detach().cpu().contiguous(), name)

    def decode(self, data: bytes | bytearray | memoryview, out: Tensor, name: bytes = b"") -> None:
        """Write the chunk into `out`, of the shape and precision that it was encoded from.

        Raises `TransferError`, with nothing written, for data that are corrupt, truncated or of
        another name, shape or format.
        """
        chunk = self._chunk(ChunkShape.of(out.shape, out.dtype))
        with self._lock:
            kv = chunk.decode(memoryview(data).cast("B"), name)
        out.copy_(kv)

    def _chunk(self, shape: ChunkShape) -> _Chunk:
        with self._lock:
            if shape not in self._chunks:
                self._chunks[shape] = _Chunk(shape, self._layers(shape), self._num_sinks)
            return self._chunks[shape]

    def _layers(self, shape: ChunkShape) -> list[LayerSpec]:
        num_heads, rest = divmod(shape.hidden_size, self._head_dim)
        if rest:
            raise ConfigError(
                f"a hidden size of {shape.hidden_size} is not heads of {self._head_dim} channels"
            )
        known = [None] * shape.num_layers if self._calibration is None else self._calibration.layers
        if len(known) != shape.num_layers:
            raise ConfigError(f"a calibration of {len(known)} layers for {shape.num_layers}")
        return [
            LayerSpec(
                kv_format=kv_format,
                num_kv_heads=num_heads,
                key_dim=self._head_dim,
                value_dim=self._head_dim,
                calibration=calibration,
            )
            for kv_format, calibration in zip(
                self._formats.of(shape.num_layers), known, strict=True
            )
        ]


class _Chunk:
    """Chunks of one shape: where their bytes lie, and blocks that they are sealed in."""

    def __init__(
        self, shape: ChunkShape, layers: Sequence[LayerSpec], num_sinks: int | None
    ) -> None:
        self.shape = shape
        self._layers = layers
        quantized = [layer for layer in layers if not layer.kv_format.is_native]
        formats = [layer.kv_format for layer in quantized]
        block_size = formats[0].block_size if formats else 1
        self._num_sealed = shape.num_tokens // block_size * block_size if formats else 0
        self._num_blocks = self._num_sealed // block_size
        if num_sinks is None:
            num_sinks = formats[0].num_sink_tokens if formats else 0
        # A chunk without a token behind the first ones has none that could stand for them.
        self._num_sinks = num_sinks if self._num_sealed > num_sinks else self._num_sealed
        if self._num_sinks == self._num_sealed:
            self._num_sealed = self._num_blocks = self._num_sinks = 0
        self._cache = self._pool([without_open_blocks(layer) for layer in quantized])
        self._header_start = self._header()
        self.num_bytes = FRAME.size + DIGEST_BYTES + len(self._named(b"")) + sum(self._sizes())

    def _pool(self, layers: Sequence[LayerSpec]) -> PagedKVCache | None:
        """Blocks for one chunk, and what a step that stores it takes beside."""
        if not self._num_blocks:
            return None
        spare = layers[0].kv_format.block_size  # open blocks that a step may take at once
        cache = PagedKVCache(
            layers, num_blocks=self._num_blocks + spare, dtype=self.shape.dtype, device="cpu"
        )
        self._manager = cache.new_manager(max_num_seqs=1, max_model_len=self.shape.num_tokens)
        return cache

    # -- the frame ------------------------------------------------------------------------------

    def _header(self) -> dict[str, object]:
        shape, sealed = self.shape, self._cache
        description = repr((self._layers, self._num_sinks, shape))
        return {
            "format": formats_name([layer.kv_format for layer in self._layers]),
            "shape": [2, shape.num_layers, shape.num_tokens, shape.hidden_size],
            "head_dim": self._layers[0].key_dim,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "num_sink_tokens": self._num_sinks,
            "byte_order": sys.byteorder,
            # Also of what is calibrated, and of options that names of formats do not tell.
            "fingerprint": sha256(description.encode()).hexdigest(),
            "records": "" if sealed is None else sealed.fingerprint().hex(),
        }

    def _named(self, name: bytes) -> bytes:
        header = self._header_start | {"name": sha256(name).hexdigest()}
        return json.dumps(header, separators=(",", ":")).encode()

    def _sizes(self) -> list[int]:
        """Bytes of records, and of tokens in full precision, of one layer after another."""
        shape, sizes, quantized = self.shape, [], 0
        num_kept = self._num_sinks + shape.num_tokens - self._num_sealed
        for layer in self._layers:
            if layer.kv_format.is_native:
                sizes += [0, shape.num_tokens * shape.token_bytes]
                continue
            record_bytes = 0
            if self._cache is not None:
                heads, size = self._cache.record_shapes[quantized]
                record_bytes = self._num_blocks * heads * size
            quantized += 1
            sizes += [record_bytes, num_kept * shape.token_bytes]
        return sizes

    # -- there and back -------------------------------------------------------------------------

    def encode(self, kv: Tensor, name: bytes) -> bytes:
        header = self._named(name)
        parts = [memoryview(FRAME.pack(MAGIC, VERSION, len(header), self.num_bytes))]
        parts.append(memoryview(header))
        records = iter(self._seal(kv))
        kept = torch.cat([kv[:, :, : self._num_sinks], kv[:, :, self._num_sealed :]], dim=2)
        for layer, spec in enumerate(self._layers):
            if spec.kv_format.is_native:
                parts.append(bytes_of(kv[:, layer]))
                continue
            if self._cache is not None:
                parts.append(bytes_of(next(records)))
            parts.append(bytes_of(kept[:, layer]))
        checksum = sha256()
        for part in parts:
            checksum.update(part)
        return b"".join([*parts, checksum.digest()])

    def decode(self, data: memoryview, name: bytes) -> Tensor:
        """The chunk, on the host; raises `TransferError` unless the data are of it."""
        body = self._body(data, name)
        shape = self.shape
        kv = torch.empty(
            2, shape.num_layers, shape.num_tokens, shape.hidden_size, dtype=shape.dtype
        )
        records: list[Tensor] = []
        quantized: list[int] = []
        start, sizes = 0, self._sizes()
        for layer, spec in enumerate(self._layers):
            middle = start + sizes[2 * layer]
            end = middle + sizes[2 * layer + 1]
            dense = body[middle:end].view(shape.dtype).view(2, -1, shape.hidden_size)
            if spec.kv_format.is_native:
                kv[:, layer] = dense
            else:
                quantized.append(layer)
                records.append(body[start:middle])
                kv[:, layer, : self._num_sinks] = dense[:, : self._num_sinks]
                kv[:, layer, self._num_sealed :] = dense[:, self._num_sinks :]
            start = end
        if self._cache is not None:
            self._read(records, quantized, kv)
        if not bool(torch.isfinite(kv).all()):
            raise TransferError("the K/V of the chunk are not all finite")
        return kv

    def _body(self, data: memoryview, name: bytes) -> Tensor:
        """uint8: all layers, of data that are known to be of this shape, format and name."""
        if len(data) < self.num_bytes:
            raise TransferError(
                f"a chunk of this shape and format has {self.num_bytes} bytes, got {len(data)}"
            )
        data = data[: self.num_bytes]  # a buffer may be larger
        magic, version, header_bytes, num_bytes = FRAME.unpack_from(data)
        if (magic, version) != (MAGIC, VERSION):
            raise TransferError(
                f"a chunk begins with {MAGIC!r} and version {VERSION}, these data with {magic!r} "
                f"and {version}"
            )
        found, expected = bytes(data[FRAME.size : FRAME.size + header_bytes]), self._named(name)
        if found != expected:
            raise TransferError(
                f"the chunk is of another kind or name: {differing(found, expected)}"
            )
        if num_bytes != self.num_bytes:
            raise TransferError(f"{self.num_bytes} bytes of a chunk that says {num_bytes}")
        if sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
            raise TransferError("the checksum differs: the chunk is corrupt")
        start = FRAME.size + header_bytes
        return torch.from_numpy(np.array(data[start:-DIGEST_BYTES]))

    # -- blocks ---------------------------------------------------------------------------------

    def _seal(self, kv: Tensor) -> list[Tensor]:
        """The records of each quantized layer."""
        if self._cache is None:
            return []
        cache, manager, size = self._cache, self._manager, self._num_sealed
        seq_id = manager.add_sequence()
        try:
            plan = manager.reserve(np.array([seq_id]), np.array([size]))
            assert plan is not None, "the pool is made for one chunk"
            step = cache.begin(plan)
            for index, layer in enumerate(self._quantized):
                tokens = kv[:, layer, :size].clone()
                tokens[:, : self._num_sinks] = tokens[:, self._num_sinks, None]
                keys, values = tokens.view(2, size, -1, self._layers[0].key_dim)
                with torch.inference_mode():
                    store_tokens(keys, values, cache, index, step)
            manager.commit(plan)
            ids = torch.from_numpy(manager.block_ids(seq_id).astype(np.int64))
            return [arena[ids] for arena in cache.arenas]
        finally:
            self._begin_again()

    def _read(self, records: Sequence[Tensor], layers: Sequence[int], kv: Tensor) -> None:
        """Write what records hold into `kv`, but for its first tokens."""
        assert self._cache is not None
        cache, manager, size = self._cache, self._manager, self._num_sealed
        chain = manager.chain_tokens([0] * size)
        seq_id, block_ids = manager.place_sequence(chain, [StoredLengths(size, self._num_blocks)])
        try:
            ids = torch.from_numpy(block_ids.astype(np.int64))
            context = StoredContext.of(
                manager, np.array([seq_id]), np.arange(size)[None], cache.device
            )
            for index, (layer, its) in enumerate(zip(layers, records, strict=True)):
                cache.arenas[index][ids] = its.view(len(ids), *cache.record_shapes[index])
                heads = cache.layers[index].num_kv_heads
                read = torch.empty(2, 1, heads, size, self._layers[0].key_dim, dtype=kv.dtype)
                context.read(cache, index, read[0], read[1])
                tokens = read[:, 0].transpose(1, 2).reshape(2, size, -1)
                kv[:, layer, self._num_sinks : size] = tokens[:, self._num_sinks :]
        finally:
            self._begin_again()

    @property
    def _quantized(self) -> list[int]:
        return [n for n, layer in enumerate(self._layers) if not layer.kv_format.is_native]

    def _begin_again(self) -> None:
        """No sequence is there, whatever an exception has left behind."""
        self._manager.recover()


def without_open_blocks(layer: LayerSpec) -> LayerSpec:
    """The same layer where every whole block is sealed."""
    kv_format: KVFormat = layer.kv_format.with_options(num_sink_tokens=0, min_tail_tokens=0)
    return LayerSpec(
        kv_format=kv_format,
        num_kv_heads=layer.num_kv_heads,
        key_dim=layer.key_dim,
        value_dim=layer.value_dim,
        calibration=layer.calibration,
    )


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


def differing(found: bytes, expected: bytes) -> str:
    """The first part in which a header is not what was expected."""
    try:
        theirs = json.loads(found)
    except ValueError:
        return "its header is not JSON"
    ours = json.loads(expected)
    if not isinstance(theirs, dict):
        return "its header is no JSON object"
    name = next((name for name in ours if theirs.get(name) != ours[name]), "more than is known")
    return f"{name} is {theirs.get(name)!r} in the data, {ours.get(name)!r} here"[:300]
