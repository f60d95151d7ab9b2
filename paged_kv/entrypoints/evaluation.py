"""What formats change in what a model says, measured on a text: a table and JSON.

Knows a model's formats and windows of tokens; keeps each result. Knows no options of a command.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.evaluate import Quality

JSON_DIGITS = 6


def to_json(quality: Quality) -> dict[str, Any]:
    """What `from_json` reads, to six digits."""
    return {
        "losses": [[float(f"{x:.{JSON_DIGITS}g}") for x in row] for row in quality.losses],
        "divergences": [
            [float(f"{x:.{JSON_DIGITS}g}") for x in row] for row in quality.divergences
        ],
        "agreements": [row.astype(int).tolist() for row in quality.agreements],
    }


def from_json(kept: dict[str, Any]) -> Quality:
    return Quality(
        np.array(kept["losses"], dtype=np.float32),
        np.array(kept["divergences"], dtype=np.float32),
        np.array(kept["agreements"], dtype=np.bool_),
    )
