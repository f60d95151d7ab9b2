"""`python -m paged_kv` is `paged-kv`. Knows nothing of its own."""

import sys

from .entrypoints.cli import main

if __name__ == "__main__":
    sys.exit(main())
