"""`paged-kv chat`: lines in, answers out as they come. Knows a terminal, never messages."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Final

from ..errors import InvalidRequestError
from ..units import format_memory
from .batch_job import warn
from .llm_options import load_llm, sampling_params
from .terminal import emit

CHAT: Final = """Talk with a model, turn by turn. What was said before is not computed again; what
no longer fits is forgotten, oldest first, and with --window a talk may go on for ever in constant
memory. Ctrl-C ends an answer, Ctrl-D the talk."""
HELP: Final = "/reset  forget what was said   /memory  what is kept   /exit  end   /help  this"
PROMPT: Final = "[bold]>[/bold] "


def add_chat(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run_chat)
    parser.add_argument("model", nargs="?", help="folder, hub name or .gguf of a chat model")
    parser.add_argument("--system", metavar="TEXT", help="how the model should behave")


def run_chat(arguments: argparse.Namespace) -> int:
    from .chat import Conversation

    params = sampling_params(arguments)
    if params.num_samples > 1:
        raise InvalidRequestError(f"a chat has one answer, not {params.num_samples}")
    with load_llm(arguments) as llm:
        conversation = Conversation(llm, params, arguments.system)
        for line in lines():
            if line == "/exit":
                break
            if line == "/reset":
                conversation.reset()
            elif line == "/memory":
                stats = llm.memory_stats()
                kept = format_memory(stats.used + stats.cached)
                emit(f"{kept} of {format_memory(stats.total)}\n")
            elif line.startswith("/"):
                emit(f"{HELP}\n")
            else:
                try:
                    say(conversation.answer(line))
                except InvalidRequestError as error:
                    warn(str(error))
    return 0


def say(answer: Iterator[str]) -> None:
    """Print an answer as it comes, until it ends or nobody wants to hear the rest."""
    with closing(answer), suppress(KeyboardInterrupt):  # type: ignore[type-var]
        for piece in answer:
            emit(piece)
    emit("\n")


def lines() -> Iterator[str]:
    """What is typed, or what is read where nobody types; blank lines are skipped."""
    if not sys.stdin.isatty():
        yield from filter(None, map(str.strip, sys.stdin))
        return
    with suppress(ImportError):
        import readline  # noqa: F401  so that arrow keys work
    from rich.console import Console

    console = Console()
    with suppress(EOFError):
        while True:
            line = console.input(PROMPT).strip()
            if line:
                yield line
