"""Results of a long measurement, kept one by one: whoever starts it again goes on with them.

Knows keys and what JSON can say, never what was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .result_file import explained


class KeptResults:
    """A file with one line for each result, beside the output they will be in; None keeps none.

    A last line that was cut off is forgotten.
    """

    def __init__(self, output: Path | None) -> None:
        self.path: Path | None = None if output is None else output.with_name(f"{output.name}.part")
        self._results: dict[str, Any] = {}
        if self.path is not None and self.path.exists():
            with explained("read", self.path):
                self._read(self.path)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            key, result = json.loads(line)
            self._results[key] = result
        if whole != content:
            path.write_bytes(whole)

    def __contains__(self, key: object) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def keep(self, key: str, result: Any) -> None:
        self._results[key] = result
        if self.path is not None:
            line = json.dumps([key, result], separators=(",", ":"))
            with explained("write", self.path), self.path.open("a", encoding="ascii") as file:
                file.write(line + "\n")
