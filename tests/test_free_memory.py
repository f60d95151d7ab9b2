"""How much memory is free: of the machine, within control groups of both versions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from paged_kv import LLM, BlockManager, LayerSpec, PagedKVCache, free_memory
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.cache import device_memory
from paged_kv.errors import ConfigError
from paged_kv.free_memory import free_host_memory, require_memory

GIB = 1 << 30
LAYER = LayerSpec(kv_format="int8", num_kv_heads=1, key_dim=64, value_dim=64)
BLOCK = LAYER.num_kv_heads * LAYER.record_layout(torch.float32).record_bytes


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Writes what the kernel would say, under folders of its own."""
    for name in ("MEMORY_INFO", "OWN_GROUPS", "GROUPS"):
        monkeypatch.setattr(free_memory, name, tmp_path / name.lower())

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


INFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable:    8388608 kB\n"


def group(limit: str, usage: str, cache: str, version: int) -> dict[str, str]:
    names = ("memory.max", "memory.current") if version == 2 else (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
    )  # fmt: skip
    cache_name = "inactive_file" if version == 2 else "total_inactive_file"
    return {names[0]: limit, names[1]: usage, "memory.stat": f"anon 7\n{cache_name} {cache}\n"}


def within(folder: str, files: dict[str, str]) -> dict[str, str]:
    return {f"groups/{folder}{name}": text for name, text in files.items()}


def test_of_a_machine_it_is_what_is_available(machine):
    machine({"memory_info": INFO})
    assert free_host_memory() == 8 * GIB


def test_where_nobody_says_it_nothing_is_refused(machine):
    assert free_host_memory() is None
    require_memory("everything", 1 << 60)


def test_a_control_group_of_version_2_limits_it(machine):
    machine({"memory_info": INFO, "own_groups": "0::/user/job\n"})
    machine(within("user/job/", group(f"{4 * GIB}\n", f"{3 * GIB}\n", str(GIB), 2)))
    assert free_host_memory() == 2 * GIB
    machine(within("user/", group(f"{GIB}\n", "1000\n", "0", 2)))  # the group around it
    assert free_host_memory() == GIB - 1000


def test_a_control_group_of_version_1_limits_it(machine):
    machine({"memory_info": INFO, "own_groups": "5:cpu:/x\n4:cpuset,memory:/job\n0::/\n"})
    machine(within("memory/job/", group(str(4 * GIB), str(3 * GIB), "0", 1)))
    assert free_host_memory() == GIB


def test_inside_a_container_its_group_is_the_root(machine):
    machine({"memory_info": INFO, "own_groups": "0::/docker/abc\n"})
    machine(within("", group(str(2 * GIB), "0", "0", 2)))
    assert free_host_memory() == 2 * GIB


@pytest.mark.parametrize("limit", ["max", "", "nonsense", str((1 << 63) - 4096)])
def test_a_group_without_a_limit_does_not_count(machine, limit):
    machine({"memory_info": INFO, "own_groups": "0::/\n"})
    machine(within("", group(limit, "0", "0", 2)))
    assert free_host_memory() == 8 * GIB


def test_a_group_over_its_limit_leaves_nothing(machine):
    machine({"memory_info": INFO, "own_groups": "0::/\n"})
    machine(within("", group("1000", "5000", "0", 2)))
    assert free_host_memory() == 0


def test_both_figures_are_named():
    with pytest.raises(ConfigError, match=r"^a thing needs 3\.0 GiB of host memory; 1\.0 GiB are"):
        require_memory("a thing", 3 * GIB, GIB)
    require_memory("a thing", GIB, GIB)


# -- pools --------------------------------------------------------------------------------------


@pytest.fixture
def one_mebibyte(monkeypatch):
    for module in (device_memory, free_memory):
        monkeypatch.setattr(module, "free_host_memory", lambda: 1 << 20)


def test_a_pool_has_to_fit(one_mebibyte):
    most = (1 << 20) // BLOCK
    cache = PagedKVCache([LAYER], num_blocks=most, dtype=torch.float32)
    assert cache.num_blocks == most
    with pytest.raises(ConfigError, match=rf"pool of {most + 1} blocks needs 1\.0 MiB .* 1\.0 MiB"):
        PagedKVCache([LAYER], num_blocks=most + 1, dtype=torch.float32)


def test_swap_space_has_to_fit_beside_a_pool_on_the_same_host(one_mebibyte):
    half = (1 << 19) // BLOCK
    PagedKVCache([LAYER], num_blocks=half, num_host_blocks=half, dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"host blocks \(swap space\) needs 1\.5 MiB"):
        PagedKVCache([LAYER], num_blocks=half, num_host_blocks=2 * half, dtype=torch.float32)


def test_a_pool_beyond_this_machine_is_refused_before_it_is_allocated(monkeypatch):
    def allocate(*_: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr("paged_kv.cache.kv_cache.zeroed_bytes", allocate)
    for options in ({"num_blocks": 1 << 30}, {"num_blocks": 1, "num_host_blocks": 1 << 30}):
        with pytest.raises(ConfigError, match=r"GiB of cpu memory; .* are free"):
            PagedKVCache([LAYER], dtype=torch.float32, **options)


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("out of memory")])
def test_an_allocation_that_fails_is_told_by_its_size(monkeypatch, error):
    def allocate(*_: object) -> None:
        raise error

    monkeypatch.setattr("paged_kv.cache.kv_cache.zeroed_bytes", allocate)
    with pytest.raises(ConfigError, match=rf"5 blocks of {BLOCK} bytes.*{error}"):
        PagedKVCache([LAYER], num_blocks=5, dtype=torch.float32)


def test_a_manager_has_to_fit(one_mebibyte):
    geometry = BlockGeometry(block_size=4, open_block_size=4, num_head_tokens=0, min_tail_tokens=0)
    with pytest.raises(ConfigError, match="a manager of 2147483647 blocks needs"):
        BlockManager(geometry, num_blocks=(1 << 31) - 1, max_num_seqs=1, max_model_len=1)


# -- the pool of an LLM -------------------------------------------------------------------------


@pytest.fixture
def model() -> LlamaForCausalLM:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("free", [64 << 20, 3 * GIB, None])
def test_the_default_pool_follows_what_is_free(model, monkeypatch, free):
    monkeypatch.setattr(device_memory, "free_host_memory", lambda: free)
    with LLM(model, kv_format="native", max_num_seqs=4096) as llm:
        total, block = llm.memory_stats().total, llm.engine.cache.block_bytes
    most = GIB if free is None else min(GIB, free // 2)
    assert most - block < total <= most


def test_what_a_few_sequences_need_is_enough(model):
    with LLM(model, max_num_seqs=1) as llm:
        assert llm.memory_stats().total < 1 << 24


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kv_memory": "10T"}, "pool of .* are free"),
        ({"num_blocks": 1 << 30}, "pool of .* are free"),
        ({"num_blocks": 1, "swap_space": "10TiB"}, "swap space.* are free"),
    ],
)
def test_memory_that_is_not_there_is_refused_and_nothing_has_changed(model, options, match):
    before, num_threads = model.config._attn_implementation, torch.get_num_threads()
    with pytest.raises(ConfigError, match=match):
        LLM(model, num_threads=num_threads + 1, **options)
    assert model.config._attn_implementation == before
    assert torch.get_num_threads() == num_threads


# -- rows of tokens -----------------------------------------------------------------------------


def manager_of_long_sequences(**options: object) -> BlockManager:
    geometry = BlockGeometry(
        block_size=16, open_block_size=16, num_head_tokens=0, min_tail_tokens=0
    )
    limits = {"num_blocks": 1000, "max_num_seqs": 4096, "max_model_len": 1 << 20}
    return BlockManager(geometry, **(limits | options))


def test_a_manager_of_many_long_sequences_is_small():
    """4096 sequences of up to a million tokens would be 16 GiB of token ids."""
    manager = manager_of_long_sequences()
    assert manager.token_ids.nbytes + manager.tables.ids.nbytes < 16 << 20


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_rows_grow_with_the_longest_sequence(prefix_caching):
    manager = manager_of_long_sequences(max_num_seqs=3, prefix_caching=prefix_caching)
    tokens = np.arange(5000) % 1000
    short, long = manager.add_sequence(tokens[:10]), manager.add_sequence(tokens[:400])
    manager.commit(manager.reserve([short, long], [10, 400]))
    for start in range(400, 5000, 230):
        manager.append_tokens([long], tokens[start : start + 230], [230])
        manager.commit(manager.reserve([long], [230]))
        manager.check_integrity()
    for token in range(700):
        manager.append_tokens([short], [token])
        manager.commit(manager.reserve([short], [1]))
    manager.check_integrity()
    assert manager.token_ids[long, :5000].tolist() == tokens.tolist()
    assert manager.token_ids[short, :710].tolist() == [*range(10), *range(700)]
    assert 5000 <= manager.token_ids.shape[1] <= 10_000
    blocks = [*manager.block_ids(short), *manager.block_ids(long)]
    assert len(set(blocks)) == len(blocks) == -(-710 // 16) + -(-5000 // 16)
    chain = manager.chain_tokens(tokens)
    if prefix_caching:
        assert manager.find_prefix(chain).num_tokens == 4992


@pytest.mark.parametrize("max_model_len", [1, 511, 512, 513, 1000, 1025])
def test_a_sequence_reaches_its_limit_and_no_further(max_model_len):
    manager = manager_of_long_sequences(max_num_seqs=2, max_model_len=max_model_len)
    seq_id = manager.add_sequence([7])
    for token in range(1, max_model_len):
        manager.append_tokens([seq_id], [token])
    manager.commit(manager.reserve([seq_id], [max_model_len]))
    assert manager.num_tokens[seq_id] == max_model_len
    assert manager.token_ids.shape[1] <= max_model_len
    with pytest.raises(ValueError, match="max_model_len"):
        manager.append_tokens([seq_id], [1])
    fork = manager.fork(seq_id)
    assert manager.chain_of(fork).token_ids.tolist() == [7, *range(1, max_model_len)]
    manager.check_integrity()


def test_one_long_sequence_does_not_make_room_for_thousands():
    manager = manager_of_long_sequences()
    tokens = np.arange(1 << 20)
    longest = manager.add_sequence(tokens)
    others = [manager.add_sequence([n]) for n in range(10)]
    assert manager.token_ids.nbytes <= 64 * tokens.nbytes // 2
    assert manager.token_ids[longest, : 1 << 20].tolist() == tokens.tolist()
    assert [manager.token_ids[other, 0] for other in others] == list(range(10))


def test_rows_come_with_new_sequences_and_forks_and_nothing_is_lost():
    manager = manager_of_long_sequences(max_num_seqs=300)
    known = {}
    for number in range(200):
        tokens = [(7 * number + place) % 90 for place in range(3 + number % 5)]
        known[manager.add_sequence(tokens)] = tokens
    while manager.num_free_seqs:
        known[manager.fork(0)] = known[0].copy()
    for token in range(600):
        seq_ids = [0, 70, 299] if token % 300 else list(known)
        manager.append_tokens(seq_ids, [token] * len(seq_ids))
        for seq_id in seq_ids:
            known[seq_id].append(token)
    for seq_id, tokens in known.items():
        assert manager.token_ids[seq_id, : len(tokens)].tolist() == tokens
        assert manager.chain_of(seq_id).token_ids.tolist() == tokens
    manager.check_integrity()


def test_growing_that_fails_changes_nothing(monkeypatch):
    manager = manager_of_long_sequences(max_num_seqs=2)
    seq_id = manager.add_sequence(np.arange(512))

    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    sequences = manager.sequences
    before = (sequences.token_ids, sequences.chains, int(manager.num_tokens[seq_id]))
    with monkeypatch.context() as patch:
        patch.setattr("paged_kv.blocks.sequences.np.zeros", no_memory)
        with pytest.raises(MemoryError):
            sequences._make_room(0, 513)
        with pytest.raises(MemoryError):
            manager.tables.make_room(1 << 19)
    assert (sequences.token_ids, sequences.chains, int(manager.num_tokens[seq_id])) == before
