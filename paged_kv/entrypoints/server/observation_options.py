"""What a server is asked to tell of itself, as options of its command. Knows arguments only."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ..llm import LLM
    from .observation import Observation

LOG_FORMATS: Final = ("text", "json")


def add_observation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("observation")
    group.add_argument("--log-format", choices=LOG_FORMATS, default="text", help="of lines (text)")
    group.add_argument(
        "--kv-events",
        metavar="ENDPOINT",
        help="tell routers what is cached, as vLLM does, for example at tcp://*:5557",
    )
    group.add_argument(
        "--kv-events-replay", metavar="ENDPOINT", help="where they ask for what they missed"
    )
    group.add_argument("--kv-events-topic", metavar="TEXT", default="", help="of these messages")


@contextmanager
def observed(arguments: argparse.Namespace, llm: LLM, model_name: str) -> Iterator[Observation]:
    """What watches an `LLM` that was loaded with the same arguments, until the block ends."""
    from .event_publisher import EventPublisher
    from .observation import Observation

    publisher = None
    if arguments.kv_events is not None:
        publisher = EventPublisher(
            llm.engine.manager.geometry.open_block_size,
            arguments.kv_events,
            replay_endpoint=arguments.kv_events_replay,
            topic=arguments.kv_events_topic,
        )
    observation = Observation(llm, model_name, publisher=publisher)
    try:
        yield observation
    finally:
        observation.close()
