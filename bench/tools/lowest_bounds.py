"""Print every lower bound of pyproject.toml as a constraint: what `make test-lowest` installs.

Development's own tools stay at their tested versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[2]
NOT_TOGETHER = {"vllm", "ray"}  # extras with pins of their own
BOUND = re.compile(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)")


def bounds(project: dict[str, object]) -> Iterator[str]:
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    required: list[str] = project["dependencies"]  # type: ignore[assignment]
    optional = (line for name in extras if name not in NOT_TOGETHER for line in extras[name])
    for line in [*required, *optional]:
        found = BOUND.match(line)
        if found is None:
            raise SystemExit(f"{line!r} has no lower bound")
        yield f"{found[1]}=={found[2]}"


if __name__ == "__main__":
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    print("\n".join(sorted(set(bounds(project)))))
