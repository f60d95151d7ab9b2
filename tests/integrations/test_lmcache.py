"""LMCache's own adapter of files stores and loads chunks by our serde, and takes damage for misses.

Needs lmcache, whose environment is not that of the other tests: see docs/lmcache.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.config import L1ManagerConfig, L1MemoryManagerConfig
from lmcache.v1.distributed.l1_manager import L1Manager
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2Adapter, FSL2AdapterConfig
from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper
from lmcache.v1.distributed.serde import create_serde_processor

from paged_kv.errors import ConfigError
from paged_kv.integrations.chunk_codec import ChunkCodec
from paged_kv.integrations.lmcache import create_serde, name_of

LAYOUT = MemoryLayoutDesc([torch.Size([2, 4, 256, 192])], [torch.bfloat16])
SECONDS = 30.0


def keys(first: int, count: int = 2) -> list[ObjectKey]:
    return [ObjectKey(bytes([first + n]) * 32, "a model", 0) for n in range(count)]


def waited_for(ask: Callable[[], Any]) -> Any:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        answer = ask()
        if answer:
            return answer
        time.sleep(0.01)
    raise AssertionError("LMCache gives no answer")


class Store:
    """LMCache's host memory, and files behind it."""

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        memory = L1MemoryManagerConfig(64 << 20, False, shm_name="")
        self.l1 = L1Manager(L1ManagerConfig(memory))
        spec = {"serde": {"type": "paged_kv", **options}}
        config = L2AdapterConfigBase._parse_serde_config(spec)
        files = FSL2Adapter(FSL2AdapterConfig(str(folder)))
        self.adapter = SerdeL2AdapterWrapper(files, create_serde_processor(config), self.l1)

    def objects(self, names: list[ObjectKey], layout: MemoryLayoutDesc = LAYOUT) -> list[Any]:
        reserved = self.l1.reserve_write(names, [False] * len(names), layout, tag="test")
        return [reserved[name][1] for name in names]

    def store(self, names: list[ObjectKey], objects: list[Any]) -> Any:
        self.adapter.submit_store_task(names, objects)
        (result,) = waited_for(self.adapter.pop_completed_store_tasks).values()
        return result

    def load(self, names: list[ObjectKey], objects: list[Any]) -> list[bool]:
        task = self.adapter.submit_load_task(names, objects)
        bitmap = waited_for(lambda: self.adapter.query_load_result(task))
        return [bitmap.test(n) for n in range(len(names))]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path, {"format": "int8", "head_dim": 64})
    yield made
    made.adapter.close()


def filled(store: Store, names: list[ObjectKey]) -> list[Any]:
    objects = store.objects(names)
    for seed, each in enumerate(objects):
        each.tensor.normal_(generator=torch.Generator().manual_seed(seed))
    assert store.store(names, objects).is_successful()
    return objects


def test_chunks_come_back_as_blocks_hold_them(store, tmp_path):
    codec, names = ChunkCodec("int8", head_dim=64), keys(1)
    stored, loaded = filled(store, names), store.objects(keys(9))
    files = list(tmp_path.glob("*.data"))
    size = codec.num_bytes(*(each[0] for each in (LAYOUT.shapes, LAYOUT.dtypes)))
    assert [file.stat().st_size for file in files] == [size] * 2
    assert stored[0].get_size() / size > 1.85
    assert store.load(names, loaded) == [True, True]
    for name, source, target in zip(names, stored, loaded, strict=True):
        expected = torch.empty_like(source.tensor)
        codec.decode(codec.encode(source.tensor, name_of(name)), expected, name_of(name))
        assert torch.equal(target.tensor, expected)


@pytest.mark.parametrize("damage", ["a byte", "cut", "another's", "empty"])
def test_damage_is_a_miss(store, tmp_path, damage):
    names = keys(1)
    filled(store, names)
    loaded = store.objects(keys(9))
    for each in loaded:
        each.tensor.fill_(7)
    first, second = sorted(tmp_path.glob("*.data"))
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(
        {"a byte": data, "cut": data[:1000], "another's": second.read_bytes(), "empty": b""}[damage]
    )
    assert not store.load(names[:1], loaded[:1])[0]
    assert bool((loaded[0].tensor == 7).all())
    assert store.load(names[1:], loaded[1:]) == [True]


def test_what_cannot_be_stored_is_not_and_says_so(store, tmp_path):
    (chunk,) = objects = store.objects(keys(1, 1))
    chunk.tensor.fill_(float("nan"))
    assert not store.store(keys(1, 1), objects).is_successful()
    assert not list(tmp_path.glob("*.data"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head_dim": 64, "fromat": "int8"}, "no option 'fromat'"),
        ({"format": "int8"}, "needs head_dim"),
        ({"head_dim": 64, "format": "int5"}, "int5"),
        ({"head_dim": 64, "max_workers": 0}, "max_workers"),
    ],
)
def test_options_that_there_are_not_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        create_serde(options)


def test_groups_of_layers_are_refused():
    serde = create_serde({"head_dim": 64})
    shapes, dtypes = LAYOUT.shapes * 2, LAYOUT.dtypes * 2
    with pytest.raises(ConfigError, match="these have 2"):
        serde.estimate_serialized_size(MemoryLayoutDesc(shapes, dtypes))
    serde.close()
