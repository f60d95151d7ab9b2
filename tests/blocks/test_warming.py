"""Warming calls every compiled loop, so that no request waits for one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import paged_kv
from paged_kv.blocks import block_pool, block_tables, growth, step_arrays
from paged_kv.blocks.warming import warm_up

MODULES = (block_pool, block_tables, growth, step_arrays)


def test_no_loop_is_left_to_be_compiled():
    pytest.importorskip("numba")
    written = {
        name
        for path in (Path(paged_kv.__file__).parent / "blocks").glob("*.py")
        for name in re.findall(r"@compiled\ndef (\w+)", path.read_text())
    }
    warm_up()
    loops = {name: getattr(m, name) for m in MODULES for name in written if hasattr(m, name)}
    assert loops.keys() == written
    assert not [name for name, loop in loops.items() if not loop.signatures]
