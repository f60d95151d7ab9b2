"""Our formats where LMCache stores chunks of K/V: a serde of its multiprocess storage.

Knows LMCache's memory objects and its registry of serdes; what the bytes are is `chunk_codec`'s.
Importing this module registers the serde "paged_kv", so that an L2 adapter can name it:

    {"type": "fs", "base_path": "/cache",
     "serde": {"type": "paged_kv", "format": "int8", "head_dim": 64}}

An exception of a deserializer is a miss to LMCache: the tokens of these chunks are computed again.
"""

from __future__ import annotations

from typing import Any, Final

from ..errors import ConfigError, MissingDependencyError, TransferError
from ..validation import is_integer, require
from .chunk_codec import ChunkCodec

try:
    from lmcache.v1.distributed.serde import (
        AsyncSerdeProcessor,
        Deserializer,
        SerdeProcessor,
        Serializer,
        get_registered_serde_types,
        register_serde_factory,
    )
except ImportError as _missing:
    raise MissingDependencyError(
        f"paged_kv.integrations.lmcache needs lmcache 0.5 ({_missing}): pip install lmcache"
    ) from _missing

NAME: Final = "paged_kv"
# What stands beside the type of a serde, and what `ChunkCodec` calls it.
OPTIONS: Final = {
    "format": "kv_format",
    "head_dim": "head_dim",
    "calibration": "calibration",
    "num_sink_tokens": "num_sink_tokens",
}


class PagedSerializer(Serializer):  # type: ignore[misc]
    """Chunks of K/V to bytes."""

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Write the bytes of `src` into `dst`, and return how many they are."""
        shape, dtype = only_group(src.get_shapes(), src.get_dtypes())
        num_bytes = self._codec.num_bytes(shape, dtype)
        if dst.get_size() < num_bytes:
            raise ConfigError(f"a chunk takes {num_bytes} bytes, the buffer has {dst.get_size()}")
        data = self._codec.encode(src.get_tensor(0), name_of(key))
        memoryview(dst.byte_array).cast("B")[:num_bytes] = data
        return num_bytes

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """Bytes of a chunk of this layout: exactly so many."""
        return self._codec.num_bytes(*only_group(layout_desc.shapes, layout_desc.dtypes))


class PagedDeserializer(Deserializer):  # type: ignore[misc]
    """Bytes back to the K/V that blocks of the format hold."""

    def __init__(self, codec: ChunkCodec) -> None:
        self._codec = codec

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Raises `TransferError`, with `dst` as it was, for bytes that are not this chunk's."""
        only_group(dst.get_shapes(), dst.get_dtypes())
        data = src.byte_array
        if data is None:
            raise TransferError("the buffer of a chunk is gone")
        self._codec.decode(data, dst.get_tensor(0), name_of(key))


def only_group(shapes: Any, dtypes: Any) -> tuple[Any, Any]:
    """The one shape and dtype of a chunk; layers of several groups have no numbers here."""
    if len(shapes) != 1 or len(dtypes) != 1:
        raise ConfigError(
            f"chunks of one group of layers can be stored, these have {len(shapes)}: "
            f"{[tuple(shape) for shape in shapes]}"
        )
    return shapes[0], dtypes[0]


def name_of(key: Any) -> bytes:
    """What LMCache knows a chunk by: bytes under another name are not taken for this one."""
    parts = (key.model_name, key.kv_rank, key.object_group_id, key.cache_salt, key.chunk_hash.hex())
    return repr(parts).encode()


def create_serde(options: dict[str, Any]) -> SerdeProcessor:
    """A serde by its options; raises `ConfigError` for those that there are not."""
    given = dict(options)
    max_workers = given.pop("max_workers", 1)
    is_count = is_integer(max_workers) and max_workers >= 1
    require("max_workers", max_workers, is_count, "an integer of at least 1")
    unknown = sorted(set(given) - set(OPTIONS))
    if unknown:
        raise ConfigError(
            f"the serde paged_kv has no option {unknown[0]!r}; there are {', '.join(OPTIONS)}, "
            "max_workers"
        )
    if "head_dim" not in given:
        raise ConfigError("the serde paged_kv needs head_dim, the channels of a kv head")
    codec = ChunkCodec(**{OPTIONS[name]: value for name, value in given.items()})
    return AsyncSerdeProcessor(PagedSerializer(codec), PagedDeserializer(codec), max_workers)


if NAME not in get_registered_serde_types():
    register_serde_factory(NAME, create_serde)
