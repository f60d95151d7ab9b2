"""Write the drawings of docs/blocks.md and docs/kernels.md. Needs only Python.

python docs/pictures/draw.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import draw_blocks
import draw_kernels

PICTURES = draw_blocks.PICTURES | draw_kernels.PICTURES


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
