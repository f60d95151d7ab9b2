"""The version of this package. Knows what is installed."""

from __future__ import annotations

from importlib import metadata


def version() -> str:
    try:
        return metadata.version("paged-kv")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"
