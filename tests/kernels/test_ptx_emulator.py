"""The emulator of PTX itself: small programs that a GPU would run wrongly, or must run rightly."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.ptx.batch import Launch
from tests.support.ptx.errors import PtxError
from tests.support.ptx.global_memory import GlobalMemory
from tests.support.ptx.machine import run_launch
from tests.support.ptx.program import parse
from tests.support.ptx.settings import Settings

# %tid.x is in %t, the address of thread t's word of global memory in %at, of shared memory in %s,
# and of the next warp's in %other.
PROGRAM = """
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(.param .u64 .ptr .global buffer)
.reqntid THREADS
{
  .reg .pred %p<4>; .reg .b32 %r<64>; .reg .b64 %rd<16>;
  .reg .b32 %t; .reg .b32 %s; .reg .b32 %other; .reg .b64 %at;
  ld.param.b64 %rd0, [buffer];
  mov.u32 %t, %tid.x;
  mul.wide.u32 %rd1, %t, 4;
  add.s64 %at, %rd0, %rd1;
  mov.b32 %r0, smem;
  shl.b32 %r1, %t, 2;
  add.s32 %s, %r0, %r1;
  xor.b32 %other, %s, 128;
  BODY
  ret;
}
"""
WAIT_FOR_ALL = "cp.async.commit_group; cp.async.wait_group 0;"
COPY = "cp.async.ca.shared.global [ %s + 0 ], [ %at + 0 ], 0x4;"


def run(
    body: str,
    buffer: NDArray,
    *,
    threads: int = 64,
    grid: int = 1,
    shared_bytes: int = 1024,
    settings: Settings | None = None,
) -> NDArray:
    """The buffer, which the program changes in place."""
    memory = GlobalMemory()
    address = memory.add(buffer.ctypes.data, buffer.nbytes, "buffer")
    program = parse(PROGRAM.replace("THREADS", str(threads)).replace("BODY", body))
    settings = settings or Settings()
    run_launch(Launch(program, (grid, 1, 1), [address], shared_bytes, memory, settings))
    return buffer


def words(count: int = 64) -> NDArray[np.uint32]:
    return np.arange(count, dtype=np.uint32) * 3


def refuses(message: str, body: str, **options) -> None:
    with pytest.raises(PtxError, match=message):
        run(body, words(), **options)


# -- memory ---------------------------------------------------------------------------------------


def test_words_are_loaded_and_stored():
    body = "ld.global.b32 %r2, [ %at + 0 ]; add.s32 %r2, %r2, 1; st.global.b32 [ %at + 0 ], %r2;"
    assert (run(body, words()) == words() + 1).all()


def test_bounds_and_alignment_are_those_of_the_buffer():
    refuses("which has 256 bytes", "ld.global.b32 %r2, [ %at + 4 ];")
    refuses("no buffer there", "mov.b64 %rd2, 64; ld.global.b32 %r2, [ %rd2 + 0 ];")
    refuses("misaligned load", "ld.global.v2.b32 {%r2, %r3}, [ %at + 0 ];")
    refuses("outside of 64 bytes", "st.shared.b32 [%s], %t;", shared_bytes=64)
    refuses("misaligned shared", "st.shared.v2.b32 [%s], {%t, %t};")


def test_ctas_do_not_meet_in_global_memory():
    number = "mov.u32 %r2, %ctaid.x;"
    refuses("different values", f"{number} st.global.b32 [ %at + 0 ], %r2;", grid=2)
    refuses(
        "another CTA reads in the same launch",
        "ld.global.b32 %r2, [ %at + 0 ]; st.global.b32 [ %at + 0 ], %r2;",
        grid=2,
    )


def test_one_address_takes_one_value():
    refuses("different values to one address", "st.global.b32 [ %rd0 + 0 ], %t;")
    refuses("different values to one shared", "st.shared.b32 [%r0], %t;", threads=32)


def test_shared_memory_that_nobody_wrote_is_not_read():
    refuses("nobody wrote", "ld.shared.b32 %r2, [%s];")


EXCHANGE = """
  ld.global.b32 %r2, [ %at + 0 ]; st.shared.b32 [%s], %r2;
  bar.sync 0;
  ld.shared.b32 %r3, [%other];
  bar.sync 0;
  st.shared.b32 [%s], %r3; st.global.b32 [ %at + 0 ], %r3;
"""


def test_warps_exchange_words_across_barriers():
    assert (run(EXCHANGE, words()) == np.roll(words(), 32)).all()


@pytest.mark.parametrize(("which", "message"), [(0, "another wrote"), (1, "another reads")])
def test_a_missing_barrier_is_seen(which, message):
    parts = EXCHANGE.split("bar.sync 0;")
    body = "".join(part + "bar.sync 0;" * (i == 1 - which) for i, part in enumerate(parts))
    refuses(message, body)


def test_a_warp_needs_no_barrier_for_its_own_words():
    body = "st.shared.b32 [%s], %t; ld.shared.b32 %r2, [%s]; st.global.b32 [ %at + 0 ], %r2;"
    assert (run(body, words()) == np.arange(64)).all()


# -- asynchronous copies --------------------------------------------------------------------------


def test_copies_land_at_their_wait():
    body = f"{COPY} {WAIT_FOR_ALL} ld.shared.b32 %r2, [%s]; st.global.b32 [ %at + 0 ], %r2;"
    assert (run(body, words()) == words()).all()


@pytest.mark.parametrize(
    "wait", ["", "cp.async.commit_group;", "cp.async.commit_group; cp.async.wait_group 1;"]
)
def test_a_copy_is_not_touched_before_its_wait(wait):
    refuses("may still write it", f"{COPY} {wait} ld.shared.b32 %r2, [%s];")
    refuses("may still write it", f"{COPY} {wait} st.shared.b32 [%s], %t;")


def test_a_copy_of_another_warp_needs_a_barrier_behind_its_wait():
    refuses("another wrote", f"{COPY} {WAIT_FOR_ALL} ld.shared.b32 %r2, [%other];")
    body = f"{COPY} {WAIT_FOR_ALL} bar.sync 0; ld.shared.b32 %r2, [%other];"
    body += "st.global.b32 [ %at + 0 ], %r2;"
    assert (run(body, words()) == np.roll(words(), 32)).all()


# -- threads --------------------------------------------------------------------------------------


def test_threads_diverge_and_meet_again():
    body = """
      setp.lt.u32 %p1, %t, 5;
      @%p1 bra $FEW;
      mov.b32 %r2, 7;
      bra $ALL;
    $FEW:
      mov.b32 %r2, 9;
    $ALL:
      st.global.b32 [ %at + 0 ], %r2;
    """
    assert run(body, words()).tolist() == [9] * 5 + [7] * 59


def test_loops_have_a_trip_count_for_each_thread():
    body = """
      mov.b32 %r2, 0;
    $LOOP:
      add.s32 %r2, %r2, 2;
      setp.lt.u32 %p1, %r2, %t;
      @%p1 bra $LOOP;
      st.global.b32 [ %at + 0 ], %r2;
    """
    expected = [max(2, t + t % 2) for t in range(64)]
    assert run(body, words()).tolist() == expected


def test_a_warp_that_has_diverged_does_nothing_together():
    shuffle = "shfl.sync.bfly.b32 %r2, %t, 1, 31, -1;"
    refuses("diverged", f"setp.lt.u32 %p1, %t, 5; @%p1 bra $END; {shuffle} $END:")
    body = f"{shuffle} st.global.b32 [ %at + 0 ], %r2;"
    assert (run(body, words()) == np.arange(64) ^ 1).all()


def test_threads_wait_at_one_barrier():
    diverged = "setp.lt.u32 %p1, %t, 32; @%p1 bra $A; bar.sync 0; bra $B; $A: bar.sync 0; $B:"
    refuses("different barriers", diverged)


def test_what_is_not_known_is_refused():
    refuses("not implemented: bar.red", "bar.red.popc.u32 %r2, 0, %p1;")
    refuses("not implemented: atom", "atom.global.add.u32 %r2, [%at], 1;")


# -- numbers --------------------------------------------------------------------------------------


def test_upper_halves_of_products():
    body = ".reg .b16 %h; cvt.u16.u32 %h, %t; mul.hi.u16 %h, %h, -21845; cvt.u32.u16 %r2, %h;"
    found = run(f"{body} st.global.b32 [ %at + 0 ], %r2;", words())
    assert (found == (np.arange(64) * 43691) >> 16).all()


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("ex2.approx.ftz.f32 %r2, %r2;", np.exp2),
        ("lg2.approx.ftz.f32 %r2, %r2;", np.log2),
        ("rcp.approx.ftz.f32 %r2, %r2;", np.reciprocal),
        ("fma.rn.f32 %r2, %r2, %r2, %r2;", lambda x: x * x + x),
        ("div.rn.f32 %r2, 0f3F800000, %r2;", lambda x: 1 / x),
        ("max.f32 %r2, %r2, 0f40000000;", lambda x: np.maximum(x, 2.0)),
        ("cvt.rn.bf16.f32 %h, %r2; cvt.f32.bf16 %r2, %h;", lambda x: x),
    ],
)
def test_functions_are_rounded_once(operation, function):
    numbers = np.linspace(0.5, 60, 64).astype(np.float32)
    if "bf16" in operation:
        numbers = np.arange(64, dtype=np.float32) * 2.0  # of few bits
    body = f".reg .b16 %h; ld.global.b32 %r2, [ %at + 0 ]; {operation}"
    found = run(f"{body} st.global.b32 [ %at + 0 ], %r2;", numbers.copy())
    assert (found == function(numbers.astype(np.float64)).astype(np.float32)).all()


@pytest.mark.parametrize(("name", "function"), [("neg", np.negative), ("abs", np.abs)])
def test_the_sign_of_both_halves_is_changed(name, function):
    numbers = np.linspace(-3, 3, 128).astype(np.float16)
    body = f"ld.global.b32 %r2, [ %at + 0 ]; {name}.f16x2 %r2, %r2; st.global.b32 [ %at + 0 ], %r2;"
    found = run(body, numbers.view(np.uint32).copy()).view(np.float16)
    assert (found == function(numbers)).all()


def test_noise_is_within_the_manual_s_limit_and_repeats():
    numbers = np.linspace(-5, 5, 64).astype(np.float32)
    body = "ld.global.b32 %r2, [ %at + 0 ]; ex2.approx.ftz.f32 %r2, %r2;"
    body += "st.global.b32 [ %at + 0 ], %r2;"
    found, again = (run(body, numbers.copy(), settings=Settings(noise=1)) for _ in range(2))
    exact = np.exp2(numbers.astype(np.float64)).astype(np.float32)
    assert (found != exact).any()
    assert (np.abs(found - exact) <= 2.01 * np.spacing(exact)).all()
    assert (found == again).all()


def fragment(matrix: NDArray) -> NDArray:
    """Registers [k * rows / 64, 32] of a warp that hold 8 x 8 parts, rows first."""
    parts = [
        np.ascontiguousarray(matrix[row : row + 8, column : column + 8]).view(np.uint32).ravel()
        for column in range(0, matrix.shape[1], 8)
        for row in range(0, matrix.shape[0], 8)
    ]
    return np.stack(parts)


@pytest.mark.parametrize("sums", ["exact", "ampere", "hopper"])
def test_matrix_products_are_sums_of_products(sums):
    generator = np.random.default_rng(0)
    left, right = (generator.normal(size=shape).astype(np.float16) for shape in ((16, 16), (8, 16)))
    total = generator.normal(size=(16, 8)).astype(np.float32)
    pairs = total.reshape(2, 8, 4, 2).transpose(0, 3, 1, 2).reshape(4, 32)
    registers = np.concatenate([fragment(left), fragment(right), pairs.view(np.uint32)])
    loads = " ".join(f"ld.global.b32 %r{10 + i}, [ %at + {128 * i} ];" for i in range(10))
    stores = " ".join(f"st.global.b32 [ %at + {128 * (6 + i)} ], %r{16 + i};" for i in range(4))
    body = f"""{loads}
      mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{%r16, %r17, %r18, %r19}},
        {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
      {stores}"""
    found = run(body, registers.ravel(), threads=32, settings=Settings(sums=sums))[192:]
    found = found.view(np.float32).reshape(2, 2, 8, 4).transpose(0, 2, 3, 1).reshape(16, 8)
    expected = left.astype(np.float64) @ right.astype(np.float64).T + total
    if sums == "exact":
        assert (found == expected.astype(np.float32)).all()
    else:
        assert not (found == expected.astype(np.float32)).all()
    assert np.abs(found - expected).max() < 16 * 2.0**-23 * np.abs(expected).max()
