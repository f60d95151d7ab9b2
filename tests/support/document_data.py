"""Data that documents show, by the language of their fence. Knows how each is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import yaml

DATA: Final[dict[str, Callable[[str], Any]]] = {
    "json": json.loads,
    "jsonl": lambda text: [json.loads(line) for line in text.splitlines()],
    "yaml": yaml.safe_load,
}
