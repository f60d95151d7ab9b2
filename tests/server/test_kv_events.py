"""Cache events on the wire: what routers decode, and that they know what can be hit."""

from __future__ import annotations

import argparse
import random
import time
from contextlib import closing
from dataclasses import replace
from threading import Event
from types import SimpleNamespace

import msgspec
import pytest
import zmq

from paged_kv import SamplingParams
from paged_kv.blocks.block_manager import BlockManager
from paged_kv.blocks.events import BlockRemoved, BlockStored, CacheCleared
from paged_kv.blocks.geometry import BlockGeometry
from paged_kv.entrypoints.cli import build_parser
from paged_kv.entrypoints.llm_options import load_llm
from paged_kv.entrypoints.server.event_publisher import EventPublisher
from paged_kv.entrypoints.server.kv_events import MessageBatch, UniformBlocks
from paged_kv.entrypoints.server.observation_options import add_observation, observed
from paged_kv.errors import ConfigError
from tests.support import router
from tests.support.prefix_caching import S, compute, every_geometry, manager_of, serve, tokens
from tests.support.router import RouterIndex, Subscriber

KEYS = [(), ("salt",), (b"adapter",), (b"adapter", "salt")]
KEYS_ON_WIRE = [None, ("salt",), ("adapter",), ("adapter", "salt")]
EVERYWHERE = "tcp://*:0"


def encoded(blocks: UniformBlocks, manager: BlockManager) -> bytes:
    messages = blocks.messages(manager.take_events())
    return msgspec.msgpack.encode(MessageBatch(ts=1.5, events=messages))


def plain(payload: bytes) -> list[dict[str, object]]:
    seconds, events, rank = msgspec.msgpack.decode(payload)
    assert (seconds, rank) == (1.5, 0)
    return events


def local(endpoint: str) -> str:
    return endpoint.replace("0.0.0.0", "127.0.0.1")


def stored(block_hash: bytes, before: int = 0, parent: bytes = b"root") -> BlockStored:
    return BlockStored(
        block_hash=block_hash.rjust(32, b"-"),
        parent_hash=parent.rjust(32, b"-"),
        token_ids=(5, 6),
        num_tokens_before=before,
        block_id=0,
    )


# -- what is told ---------------------------------------------------------------------------------


def test_blocks_of_a_prompt_are_one_message_with_the_fields_of_vllm():
    manager = manager_of(num_blocks=3, record_events=True)
    blocks = UniformBlocks(4)
    first, second = manager.chain_tokens(tokens(9)).hashes
    serve(manager, tokens(9))
    hashes = [int.from_bytes(h[-8:], "big") for h in (first, second)]
    assert plain(encoded(blocks, manager)) == [
        {
            "type": "BlockStored",
            "block_hashes": hashes,
            "parent_block_hash": None,
            "token_ids": tokens(8),
            "block_size": 4,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None, None],
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }
    ]
    serve(manager, tokens(5, 50))  # evicts the second
    removed, other = plain(encoded(blocks, manager))
    assert removed == {
        "type": "BlockRemoved", "block_hashes": hashes[1:], "medium": "GPU", "group_idx": 0
    }  # fmt: skip
    assert other["parent_block_hash"] is None
    manager.reset_prefix_cache()
    assert plain(encoded(blocks, manager)) == [{"type": "AllBlocksCleared"}]


def test_a_sequence_that_goes_on_names_the_block_before():
    manager = manager_of(record_events=True)
    blocks = UniformBlocks(4)
    seq_id = manager.add_sequence(tokens(5))
    compute(manager, seq_id)
    (begun,) = plain(encoded(blocks, manager))
    manager.append_tokens([seq_id] * 1, [7])
    manager.append_tokens([seq_id], [8])
    manager.append_tokens([seq_id], [9])
    compute(manager, seq_id)
    (later,) = plain(encoded(blocks, manager))
    assert later["parent_block_hash"] == begun["block_hashes"][-1]
    assert later["token_ids"] == [4, 7, 8, 9]


def test_adapters_and_salts_are_told_as_vllm_does():
    manager = manager_of(record_events=True)
    blocks = UniformBlocks(4)
    for keys, wire in zip(KEYS, KEYS_ON_WIRE, strict=True):
        serve(manager, tokens(9), keys)
        (event,) = plain(encoded(blocks, manager))
        has_adapter = b"adapter" in keys
        assert event["lora_name"] == ("adapter" if has_adapter else None)
        later = ["adapter"] if has_adapter else None
        assert event["extra_keys"] == [wire and list(wire), later]


def test_what_nobody_else_can_hit_is_not_told():
    manager = manager_of(num_blocks=3, record_events=True)
    blocks = UniformBlocks(4)
    serve(manager, tokens(9), ("looked at 5f",))
    assert plain(encoded(blocks, manager)) == []
    serve(manager, tokens(9))  # evicts the others
    assert [event["type"] for event in plain(encoded(blocks, manager))] == ["BlockStored"]


def test_of_groups_of_layers_the_first_is_told():
    events = [stored(b"a"), replace(stored(b"a"), group=1), replace(stored(b"b"), group=2)]
    removed = BlockRemoved(block_hash=b"a".rjust(32, b"-"), block_id=0)
    blocks = UniformBlocks(2)
    (message,) = blocks.messages(events)
    assert len(message.block_hashes) == 1
    assert blocks.messages([replace(removed, group=1)]) == []
    (message,) = blocks.messages([removed])
    assert message.block_hashes == [int.from_bytes(b"a".rjust(8, b"-"), "big")]


def test_a_key_that_is_no_text_is_told_as_text():
    manager = manager_of(record_events=True)
    serve(manager, tokens(5), ("\ud800", b"\xff"))
    (event,) = plain(encoded(UniformBlocks(4), manager))
    assert event["extra_keys"] == [["\ufffd", "?"]]


def test_a_sealed_block_is_several_and_its_beginning_is_there_as_long_as_anybody_has_it():
    manager = manager_of(S, record_events=True)  # a head of 4, blocks of 8, open ones of 4
    blocks = UniformBlocks(4)
    serve(manager, tokens(15))
    (whole,) = plain(encoded(blocks, manager))
    assert whole["token_ids"] == tokens(12)
    assert len(set(whole["block_hashes"])) == 3
    serve(manager, tokens(8) + tokens(7, 90))
    (branch,) = plain(encoded(blocks, manager))  # the first half of its block is there
    assert branch["token_ids"] == tokens(4, 90)
    assert branch["parent_block_hash"] == whole["block_hashes"][1]
    first, second = sorted(blocks._blocks, key=lambda link: len(blocks._blocks[link]))[1:]
    removed = blocks.messages([BlockRemoved(block_hash=first, block_id=0)])
    assert removed[0].block_hashes == whole["block_hashes"][2:]
    removed = blocks.messages([BlockRemoved(block_hash=second, block_id=0)])
    assert removed[0].block_hashes == [whole["block_hashes"][1], *branch["block_hashes"]]


# -- what a router knows is what can be hit -------------------------------------------------------


class Traffic:
    """Random prompts that begin alike on a small pool, and a router that is told of it."""

    def __init__(self, geometry: BlockGeometry, seed: int) -> None:
        self.rng = random.Random(seed)
        self.geometry = geometry
        self.manager = manager_of(geometry, num_blocks=24, max_num_seqs=4, record_events=True)
        self.living: list[int] = []

    def prompt(self) -> list[int]:
        opening = self.rng.choice([[0] * 40, [0] * 9 + [1] * 30, [1, 0] * 20])
        tail = [self.rng.randrange(2) for _ in range(self.rng.randint(1, 8))]
        return opening[: self.rng.randint(0, 40)] + tail

    def act(self) -> None:
        manager, rng = self.manager, self.rng
        action = rng.random()
        if action < 0.03 and not self.living:
            manager.reset_prefix_cache()
        elif action < 0.3 and manager.num_free_seqs:
            chain = manager.chain_tokens(self.prompt(), rng.choice(KEYS))
            self.living.append(manager.add_sequence(chain))
        elif action < 0.45 and self.living:
            manager.remove_sequence(self.living.pop(rng.randrange(len(self.living))))
        elif self.living:
            self.step(rng.choice(self.living))

    def step(self, seq_id: int) -> None:
        manager = self.manager
        left = int(manager.num_tokens[seq_id] - manager.num_computed_tokens[seq_id])
        if not left:
            manager.append_tokens([seq_id], [self.rng.randrange(2)])
            left = 1
        plan = None
        if manager.num_tokens[seq_id] < 70:
            plan = manager.reserve([seq_id], [self.rng.randint(1, left)])
        if plan is None:
            self.living.remove(seq_id)
            manager.remove_sequence(seq_id)
        else:
            manager.commit(plan)

    def hits(self, index: RouterIndex, prompt: list[int], which: int) -> tuple[int, int]:
        """Tokens that a router expects to be found, as far as links go, and those that are."""
        geometry = self.geometry
        num_tokens = index.num_tokens(prompt, KEYS_ON_WIRE[which])
        most = geometry.num_shareable_links(len(prompt))
        links = [n for n in range(most + 1) if geometry.link_end(n) <= num_tokens]
        found = self.manager.find_prefix(self.manager.chain_tokens(prompt, KEYS[which]))
        return geometry.link_end(links[-1]), found.num_tokens


@every_geometry
@pytest.mark.parametrize("seed", range(2))
def test_an_index_of_the_events_says_what_the_manager_can_hit(geometry, seed):
    traffic = Traffic(geometry, seed)
    size = geometry.open_block_size
    blocks, index = UniformBlocks(size), RouterIndex(size)
    num_hits = 0
    for _ in range(400):
        traffic.act()
        index.apply(encoded(blocks, traffic.manager))
        for _ in range(3):
            expected, found = traffic.hits(index, traffic.prompt(), traffic.rng.randrange(4))
            assert expected == found
            num_hits += found > 0
    assert num_hits > 100
    for seq_id in traffic.living:
        traffic.manager.remove_sequence(seq_id)
    traffic.manager.reset_prefix_cache()
    index.apply(encoded(blocks, traffic.manager))
    assert not index.contents
    assert not blocks._blocks
    assert not blocks._num_links


# -- sockets --------------------------------------------------------------------------------------


@pytest.fixture
def publisher():
    made = EventPublisher(2, EVERYWHERE, replay_endpoint=EVERYWHERE, topic="kv@here@model")
    yield made
    made.close()


def subscribed(publisher: EventPublisher) -> tuple[Subscriber, int]:
    """One who is sure to get what is published from now on, and the last number that it has."""
    subscriber = Subscriber(local(publisher.endpoint), local(publisher.replay_endpoint), "kv@")
    while not subscriber.events.poll(20):
        publisher.publish([CacheCleared()])
    *_, number, _ = subscriber.receive()
    while subscriber.events.poll(50):
        *_, number, _ = subscriber.receive()
    return subscriber, number


def test_batches_come_in_order_and_missed_ones_are_replayed(publisher):
    subscriber, number = subscribed(publisher)
    with subscriber:
        for name in (b"a", b"b", b"c"):
            publisher.publish([stored(name)])
        batches = [subscriber.receive() for _ in range(3)]
        assert {topic for topic, _, _ in batches} == {b"kv@here@model"}
        assert [n for _, n, _ in batches] == [number + 1, number + 2, number + 3]
        hashes = [router.decode(payload).events[0].block_hashes for _, _, payload in batches]
        assert hashes == [[int.from_bytes(n.rjust(8, b"-"), "big")] for n in (b"a", b"b", b"c")]
        assert abs(router.decode(batches[0][2]).ts - time.time()) < 60
        assert subscriber.replay(number + 2) == [batch[1:] for batch in batches[1:]]
        assert [n for n, _ in subscriber.replay(0)] == list(range(number + 4))
        assert subscriber.replay(number + 4) == []


def test_only_the_newest_batches_are_kept_for_replays():
    publisher = EventPublisher(2, EVERYWHERE, replay_endpoint=EVERYWHERE, buffer_steps=2)
    subscriber = Subscriber(local(publisher.endpoint), local(publisher.replay_endpoint))
    with closing(publisher), subscriber:
        for name in (b"a", b"b", b"c"):
            publisher.publish([stored(name)])
        while (kept := [n for n, _ in subscriber.replay(0)]) != [1, 2]:
            assert len(kept) <= 2


def test_a_request_that_is_no_number_is_passed_over(publisher, caplog):
    subscriber, number = subscribed(publisher)
    with subscriber:
        for frames in ([b"", b"12"], [b"x"], [b"", b"0" * 8, b"more"]):
            subscriber.replays.send_multipart(frames)
        assert subscriber.replay(number + 1) == []
    assert caplog.text.count("not a number in 8 bytes") == 3


def test_the_engine_never_waits_and_what_was_dropped_is_not_counted_on():
    publisher = EventPublisher(2, EVERYWHERE, replay_endpoint=EVERYWHERE, max_queue_size=1)
    index = RouterIndex(2)
    go_on, send = Event(), publisher._send
    publisher._send = lambda step: (go_on.wait(10), send(step))
    subscriber = Subscriber(local(publisher.endpoint), local(publisher.replay_endpoint))
    with closing(publisher), subscriber:
        publisher.publish([stored(b"a")])
        while not publisher._steps.empty():  # until it is held up with this one
            time.sleep(0.001)
        publisher.publish([stored(b"b", 2, b"a")])
        publisher.publish([BlockRemoved(block_hash=b"a".rjust(32, b"-"), block_id=0)])
        publisher.publish([BlockRemoved(block_hash=b"b".rjust(32, b"-"), block_id=0)])
        assert publisher.num_dropped == 2
        go_on.set()
        while not publisher._steps.empty():
            time.sleep(0.001)
        publisher.publish([BlockRemoved(block_hash=b"z".rjust(32, b"-"), block_id=0), stored(b"c")])
        while len(batches := subscriber.replay(0)) < 3:
            pass
        numbers = [number for number, _ in batches]
        assert numbers == [0, 1, 4]
        for _, payload in batches[:2]:
            index.apply(payload)
        assert len(index.contents) == 2
        index.apply(batches[2][1])
        assert list(index.contents) == [int.from_bytes(b"c".rjust(8, b"-"), "big")]


def test_a_step_that_cannot_be_sent_is_logged_and_the_next_begins_anew(publisher, caplog):
    subscriber, number = subscribed(publisher)
    with subscriber:
        publisher.publish([stored(b"a"), SimpleNamespace()])  # what no event is clears
        publisher.publish([BlockStored(**{**vars(stored(b"b")), "token_ids": (object(), 1)})])
        publisher.publish([stored(b"c")])
        *_, payload = subscriber.receive()
        *_, later, payload = subscriber.receive()
        assert later == number + 3
        cleared, event = router.decode(payload).events
        assert isinstance(cleared, router.AllBlocksCleared)
        assert event.block_hashes == [int.from_bytes(b"c".rjust(8, b"-"), "big")]
    assert "were not sent" in caplog.text


def test_an_endpoint_that_cannot_be_had_is_refused(publisher):
    taken = publisher.replay_endpoint
    for endpoint, replay in ((EVERYWHERE, taken), ("tcp://*:x", None), ("nonsense", None)):
        with pytest.raises(ConfigError, match="cache events cannot be sent from"):
            EventPublisher(2, endpoint, replay_endpoint=replay)


def test_an_endpoint_without_a_wildcard_is_connected_to():
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe("")
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        publisher = EventPublisher(2, f"tcp://127.0.0.1:{port}")
        while not socket.poll(20):
            publisher.publish([CacheCleared()])
        publisher.close()


def test_closing_sends_what_is_queued():
    publisher = EventPublisher(2, EVERYWHERE)
    subscriber = Subscriber(local(publisher.endpoint))
    with subscriber:
        while not subscriber.events.poll(20):
            publisher.publish([CacheCleared()])
        for _ in range(50):
            publisher.publish([stored(b"a")])
        publisher.publish([CacheCleared(), stored(b"last")])
        publisher.close()
        while len(router.decode(subscriber.receive()[2]).events) < 2:
            pass


# -- an LLM ---------------------------------------------------------------------------------------


def test_options_of_a_server_tell_routers_what_its_llm_has_cached():
    parser = argparse.ArgumentParser()
    add_observation(parser)
    settings = ["--kv-format", "int4", "--num-blocks", "60", "--calibration", "none"]
    events = ["--kv-events", EVERYWHERE, "--kv-events-replay", EVERYWHERE]
    arguments = build_parser().parse_args(["chat", *settings])
    vars(arguments).update(vars(parser.parse_args(events)))
    prompt = [9 + n % 50 for n in range(330)]
    with load_llm(arguments) as llm, observed(arguments, llm, "demo") as observation:
        llm.generate([prompt], SamplingParams(max_tokens=1, cache_salt="s"))
        observation.step_done(llm)
        publisher = observation.publisher
        with Subscriber(local(publisher.endpoint), local(publisher.replay_endpoint)) as subscriber:
            while not (batches := subscriber.replay(0)):
                pass
        index = RouterIndex(llm.engine.manager.geometry.open_block_size)
        index.apply(batches[0][1])
        chain = llm.engine.manager.chain_tokens(prompt, ("s",))
        assert llm.engine.manager.find_prefix(chain).num_tokens == 32 + 2 * 128
        assert index.num_tokens(prompt, ("s",)) == 32 + 2 * 128
        assert index.num_tokens(prompt) == 0
