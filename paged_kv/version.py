"""The version of this package, which wheels, `paged-kv --version` and servers take from here."""

from __future__ import annotations

__version__ = "0.2.0.dev0"
