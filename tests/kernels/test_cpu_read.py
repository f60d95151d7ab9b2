"""What the CPU's kernels read back: bit by bit what the reference does, whatever a record holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paged_kv.cache.block_views import layer_blocks
from paged_kv.cache.formats import FORMATS, INT2, INT4, KIVI2, KVFormat
from paged_kv.cache.layer_spec import LayerSpec, cache_geometry
from paged_kv.kernels.block_views import LayerBlocks
from paged_kv.kernels.cpu.read import read_stored
from paged_kv.kernels.eager import read as reference
from paged_kv.kernels.eager.rotation import rotate
from paged_kv.kernels.stored_places import DenseTokens, StoredPlaces
from tests.support import cpu_kernels

two_threads = cpu_kernels.two_threads

NUM_BLOCKS, NUM_HEADS, NUM_ROWS = 9, 2, 3
READ_FORMATS = {
    **FORMATS,
    "int4-groups": INT4.with_options(key_group_size=32, rotates_values=False),
    "int4-block64": INT4.with_options(block_size=64, wide_key_share=0.25),
    "int2-narrow": INT2.with_options(wide_key_share=0.0, rotates_values=False),
    "kivi2-block64": KIVI2.with_options(block_size=64),
}


def random_layer(kv_format: KVFormat, dtype: torch.dtype, dims: tuple[int, int]) -> LayerBlocks:
    """Blocks full of codes that nobody quantized, with numbers for scales and in open blocks."""
    layer = LayerSpec(
        kv_format=kv_format, num_kv_heads=NUM_HEADS, key_dim=dims[0], value_dim=dims[1]
    )
    shape = NUM_BLOCKS, NUM_HEADS, layer.record_layout(dtype).record_bytes
    arena = torch.randint(0, 256, shape, dtype=torch.uint8)
    blocks = layer_blocks(arena, layer, dtype, cache_geometry([layer], dtype).open_block_size)
    is_open = torch.arange(NUM_BLOCKS) < NUM_BLOCKS // 3  # a record is open or sealed
    for section in (blocks.open_keys, blocks.open_values):
        section[is_open] = torch.randn(section[is_open].shape).to(dtype)
    if blocks.sealed is not None:
        for name, section in blocks.sealed._asdict().items():
            if section is not None and name.endswith(("scale", "zero")):
                section[~is_open] = torch.randn(section[~is_open].shape).to(section.dtype)
    return blocks


def random_places(layer: LayerBlocks) -> tuple[StoredPlaces, Tensor]:
    """Open tokens before and behind sealed ones, of sequences that differ, and holes between."""
    size = layer.open_keys.shape[2]
    open_slots = torch.randperm(NUM_BLOCKS // 3 * size)[:NUM_ROWS].repeat(2)
    sealed_ids = torch.tensor([4, 8, 3, 6][: 4 if layer.sealed is not None else 0])
    block_size = 1 if layer.sealed is None else layer.sealed.block_size
    places = StoredPlaces(
        open_rows=torch.arange(NUM_ROWS).repeat(2),
        open_tokens=torch.tensor([0] * NUM_ROWS + [1 + 2 * block_size] * NUM_ROWS),
        open_slots=open_slots,
        sealed_rows=torch.tensor([0, 0, 2, 2])[: len(sealed_ids)],
        sealed_tokens=(
            1
            + torch.tensor([0, 1, 0, 1])[: len(sealed_ids), None] * block_size
            + torch.arange(block_size)
        ),
        sealed_ids=sealed_ids,
    )
    length = 2 + 2 * block_size
    columns = torch.stack([torch.randperm(length + 5)[:length] for _ in range(NUM_ROWS)])
    return places, columns


@pytest.mark.parametrize("dims", [(64, 64), (40, 256)], ids=["64", "40-256"])
@pytest.mark.parametrize("name", READ_FORMATS)
def test_what_is_stored_is_read_as_the_reference_reads_it(name, dims, two_threads):
    torch.manual_seed(0)
    kv_format = READ_FORMATS[name]
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        layer = random_layer(kv_format, dtype, dims)
        places, columns = random_places(layer)
        length = int(columns.max()) + 1

        def target(
            wanted: torch.dtype = wanted, columns: Tensor = columns, length: int = length
        ) -> DenseTokens:
            keys, values = (torch.zeros(NUM_ROWS, NUM_HEADS, length, dim) for dim in dims)
            return DenseTokens(keys.to(wanted), values.to(wanted), columns)

        expected, found = target(), target()
        turned = kv_format.rotates_values
        reference.read_stored(layer, places, expected, rotate if turned else None)
        read_stored(layer, places, found, rotates_values=turned)
        assert expected.keys.isfinite().all()
        assert expected.keys.any(-1).sum() > 2 * NUM_ROWS
        assert found.keys.equal(expected.keys)
        assert found.values.equal(expected.values)
