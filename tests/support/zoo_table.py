"""docs/models.md: what becomes of every model of the zoo, written from what the tests run.

python -m tests.support.zoo_table > docs/models.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import zoo
from .zoo_pieces import EXACT, GATHERED, GATHERED_STATES

if TYPE_CHECKING:
    from paged_kv import LLM

OPENING = """# Models

Which of transformers' decoder-only language models are served, and why others are refused.
Written by `make models` from what `tests/models/test_zoo.py` runs, a small random model a line:
{summary}.

*Exact*: eight sequences at once, in chunks, preempted, and again on hits in the prefix cache have
the greedy tokens of the model's own `generate()`, in native blocks; and others once the past is
hidden. *Refused*: by an error with these words, before anything has changed. A model that is not
listed is looked at when it is loaded: where each of its layers calls the *attention interface*,
once, with nothing but what is known here, our kernels read the blocks; else it is tried whether it
computes the same by *gathering*, with a cache that gives it what blocks hold, and recurrent layers
their *states* ([two routes](embedding.md#two-routes-in-llm)).

| family | class | configuration | route | result |
|---|---|---|---|---|
"""


def route_of(llm: LLM) -> str:
    """In the words of the table."""
    if llm.route == "fused":
        return EXACT.route
    return (GATHERED_STATES if llm.engine.model.keeps_states else GATHERED).route


def summary() -> str:
    families = {zoo.model_type(name) for name in zoo.ARCHITECTURES}
    return (
        f"{len(zoo.ARCHITECTURES)} configurations of {len(families)} families exact, "
        f"{len(zoo.REFUSED)} refused"
    )


def table() -> str:
    lines = []
    for name, configuration in zoo.CONFIGURATIONS.items():
        outcome = configuration.outcome
        result = f"refused: {outcome.refusal}" if outcome.refusal else "exact"
        cells = (
            zoo.model_type(name),
            f"`{configuration.class_name}`",
            f"{name}: {configuration.special}",
            outcome.route or "none",
            result,
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return OPENING.format(summary=summary()) + "".join(lines)


if __name__ == "__main__":
    print(table(), end="")
