"""What our kernels and the emulator of PTX assume of a GPU's arithmetic, measured on the device.

    PYTHONPATH=.:bench python bench/tools/gpu_expectations.py --json FILE [--answers FILE.npz]

Tiny kernels made of the helpers of `kernels/triton/codes.py`: unpacked codes of every byte, their
products as subnormal fp16, sums of tensor cores, approximate functions, divisions, roundings. A row
has what was measured beside what is allowed; exit 1 where more was found. The answers themselves go
to FILE.npz, for `python -m tests.soak.ptx_answers` to compare with the emulator's number by number.

With TRITON_INTERPRET=1 a CPU shows that all of it runs. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from report import Row, add_arguments, write_report

from paged_kv.kernels.triton.codes import (
    CODE_UNIT,
    codes_of_plane,
    fast_exp2,
    fast_inverse,
    fast_log2,
    planes_of_3_bits,
    planes_of_codes,
    product,
    rounded_to,
)

LEAST_NORMAL = 2.0**-126  # of float32
UNIT = float(CODE_UNIT.value)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TL_DTYPES = {"fp16": tl.float16, "bf16": tl.bfloat16}
SHAPES = ((16, 16, 1), (64, 16, 4), (64, 64, 4))  # rows and columns of a product, warps
DEPTHS, QUICK_DEPTHS = (16, 64, 128), (16, 64)  # the second is several instructions long


class Product(NamedTuple):
    """A product of one program: [rows, depth] @ [depth, columns], or all of it transposed."""

    rows: int
    columns: int
    num_warps: int
    depth: int
    dtype: str
    is_transposed: bool

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.depth}x{self.columns}"
        turned = ", transposed" if self.is_transposed else ""
        return f"{self.dtype} {shape}, {self.num_warps} warps{turned}"


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def unpack_kernel(codes, found, BITS: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    planes = planes_of_codes(tl.load(codes + at), BITS)
    for plane in tl.static_range(8 // BITS):
        tl.store(found + plane * COUNT + at, planes[plane])


@triton.jit
def shift_kernel(codes, found, BITS: tl.constexpr, COUNT: tl.constexpr):
    at = tl.arange(0, COUNT)
    for plane in tl.static_range(8 // BITS):
        shift = tl.zeros([COUNT], tl.int32) + plane * BITS
        tl.store(found + plane * COUNT + at, codes_of_plane(tl.load(codes + at), shift, BITS))


@triton.jit
def third_bits_kernel(lower, upper, found, TILE: tl.constexpr, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    planes = planes_of_3_bits(tl.load(lower + at), tl.load(upper + at), 2 - TILE)
    for plane in tl.static_range(4):
        tl.store(found + plane * tl.num_programs(0) * COUNT + at, planes[plane])


@triton.jit
def function_kernel(numbers, others, found, FUNCTION: tl.constexpr, COUNT: tl.constexpr):
    at = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    x = tl.load(numbers + at)
    if FUNCTION == "ex2.approx":
        result = fast_exp2(x)
    elif FUNCTION == "lg2.approx":
        result = fast_log2(x)
    elif FUNCTION == "rcp.approx":
        result = fast_inverse(x)
    elif FUNCTION == "div.full":
        result = x / tl.load(others + at)
    elif FUNCTION == "div.rn":
        result = tl.div_rn(x, tl.load(others + at))
    elif FUNCTION == "to fp16":
        result = x.to(tl.float16)
    elif FUNCTION == "to bf16":
        result = rounded_to(x, tl.bfloat16)
    else:
        result = x.to(tl.float32)
    tl.store(found + at, result)


@triton.jit
def product_kernel(
    left, right, total, found,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Matrices lie with their rows one after another, as they are not transposed."""
    row, deep, column = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    if TRANSPOSED:
        a = tl.load(left + row[None, :] * DEPTH + deep[:, None])
        b = tl.load(right + deep[None, :] * COLUMNS + column[:, None])
        at = row[None, :] * COLUMNS + column[:, None]
    else:
        a = tl.load(left + row[:, None] * DEPTH + deep[None, :])
        b = tl.load(right + deep[:, None] * COLUMNS + column[None, :])
        at = row[:, None] * COLUMNS + column[None, :]
    tl.store(found + at, product(a, b, tl.load(total + at), TRANSPOSED))


@triton.jit
def code_product_kernel(
    codes, right, found,
    BITS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first plane of packed codes [rows, depth], as it is unpacked, times queries."""
    row, deep, column = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, COLUMNS)
    a = planes_of_codes(tl.load(codes + row[:, None] * DEPTH + deep[None, :]), BITS)[0]
    b = tl.load(right + deep[:, None] * COLUMNS + column[None, :])
    none = tl.zeros([ROWS, COLUMNS], tl.float32)
    at = row[:, None] * COLUMNS + column[None, :]
    tl.store(found + at, product(a, b, none, 0))


# -- numbers that are asked for -------------------------------------------------------------------


def of_all_bytes() -> NDArray[np.uint8]:
    return np.arange(256, dtype=np.uint8)


def byte_pairs(quick: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Every lower byte beside every upper one, or beside each eighth."""
    uppers = of_all_bytes()[:: 8 if quick else 1]
    return np.tile(of_all_bytes(), len(uppers)), np.repeat(uppers, 256)


def function_inputs(name: str, quick: bool) -> tuple[NDArray, NDArray]:
    """What a function is asked for, and what is beside it."""
    generator = np.random.default_rng(0)
    count = 1 << (11 if quick else 18)
    ones = np.ones(count, np.float32)
    if name == "ex2.approx":
        numbers = generator.uniform(-130, 20, count).astype(np.float32)
        numbers[:160] = np.arange(-130, 30)
        numbers[160:163] = -1e30, -np.inf, 0.0
        return numbers, ones
    if name == "of fp16":
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        return halves[np.isfinite(halves)][:63488], ones[:1]
    exponents = generator.integers(-60, 60, (2, count))
    numbers, others = np.ldexp(generator.uniform(1, 2, (2, count)), exponents).astype(np.float32)
    if name in ("to fp16", "to bf16"):
        # The neighbourhood of every fp16 number, half-way points and subnormal numbers included.
        halves = generator.integers(0, 0x7BFF, count).astype(np.uint16).view(np.float16)
        above = np.nextafter(halves, np.float16(np.inf)).astype(np.float32)
        middle = (halves.astype(np.float32) + above) / 2
        numbers[::4], numbers[1::4] = middle[::4], np.nextafter(middle, np.float32(0))[1::4]
        numbers[2::4] = np.nextafter(middle, np.float32(1e9))[2::4]
        numbers[:3] = 65519.0, 65520.0, 1e30
        # bfloat16's half-way points, every second of them between an odd and an even neighbour.
        upper = generator.integers(0x3000, 0x5000, count // 8).astype(np.uint32) << 16
        numbers[3::8] = (upper | 0x8000).view(np.float32)[: len(numbers[3::8])]
    signs = generator.choice(np.float32([-1, 1]), count)
    if name == "lg2.approx":  # of scales, which were fp16
        return np.ldexp(np.frexp(numbers)[0], generator.integers(-23, 17, count)), others
    return numbers * signs, others


def matrices(case: Product, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of several magnitudes, and a total that is as great as the products."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        magnitudes = torch.randint(-3, 4, shape, generator=generator).float().exp2()
        return torch.randn(shape, generator=generator) * magnitudes

    left = normal(case.rows, case.depth).to(DTYPES[case.dtype])
    right = normal(case.depth, case.columns).to(DTYPES[case.dtype])
    return left, right, normal(case.rows, case.columns) * 4


def code_matrices(bits: int, rows: int, depth: int, columns: int) -> tuple[NDArray, torch.Tensor]:
    """Packed codes, and whole queries so small that float32 holds all sums exactly."""
    codes = np.resize(of_all_bytes(), (rows, depth)).astype(np.uint8)
    queries = np.random.default_rng(bits).integers(-64, 65, (depth, columns))
    return codes, torch.from_numpy(queries.astype(np.float32)).half()


def products(quick: bool) -> list[Product]:
    return [
        Product(*shape, depth, dtype, is_transposed)
        for shape in SHAPES
        for depth in (QUICK_DEPTHS if quick else DEPTHS)
        for dtype in DTYPES
        for is_transposed in (False, True)
    ]


# -- answers --------------------------------------------------------------------------------------

FUNCTIONS = (
    *("ex2.approx", "lg2.approx", "rcp.approx", "div.full", "div.rn"),
    *("to fp16", "to bf16", "of fp16"),
)
CODE_PRODUCTS = [(bits, *shape) for bits in (8, 4, 2) for shape in SHAPES]


def ask(kernel: object, *numbers: object, shape: tuple[int, ...], dtype: torch.dtype,
        grid: int = 1, device: torch.device, **options: object) -> NDArray:  # fmt: skip
    """The bits that a kernel leaves, or the float32 numbers; what it leaves out is not a number."""
    tensors = [
        torch.from_numpy(each).to(device) if isinstance(each, np.ndarray) else each.to(device)
        for each in numbers
    ]
    found = torch.full(shape, torch.nan, dtype=dtype, device=device)
    kernel[(grid,)](*tensors, found, enable_fp_fusion=False, **options)
    found = found.cpu()
    return (found if dtype == torch.float32 else found.view(torch.int16)).numpy()


def unpacked(quick: bool, device: torch.device) -> dict[str, NDArray]:
    found = {}
    common = {"dtype": torch.float16, "device": device, "num_warps": 1}
    for bits in (8, 4, 2):
        for name, kernel in (("planes", unpack_kernel), ("shifted", shift_kernel)):
            found[f"{name} of {bits} bits"] = ask(
                kernel, of_all_bytes(), shape=(8 // bits, 256), BITS=bits, COUNT=256, **common
            )
    found["shifted of 1 bits"] = ask(
        shift_kernel, of_all_bytes(), shape=(8, 256), BITS=1, COUNT=256, **common
    )
    lower, upper = byte_pairs(quick)
    for tile in (0, 1):
        found[f"third bits, tile {tile}"] = ask(
            third_bits_kernel, lower, upper, shape=(4, len(lower)), grid=len(lower) // 1024,
            TILE=tile, COUNT=1024, **common,
        )  # fmt: skip
    return found


def answers(quick: bool, device: torch.device) -> dict[str, NDArray]:
    """What the device makes of all that is asked, the same everywhere: name to bits or float32."""
    found = unpacked(quick, device)
    for name in FUNCTIONS:
        numbers, others = function_inputs(name, quick)
        dtype = {"to fp16": torch.float16, "to bf16": torch.bfloat16}.get(name, torch.float32)
        found[name] = ask(
            function_kernel, numbers, others, shape=(len(numbers),), dtype=dtype,
            grid=len(numbers) // 1024, device=device, FUNCTION=name, COUNT=1024,
        )  # fmt: skip
    for bits, rows, columns, num_warps in CODE_PRODUCTS:
        found[code_product_name(bits, rows, columns)] = ask(
            code_product_kernel, *code_matrices(bits, rows, 64, columns), shape=(rows, columns),
            dtype=torch.float32, device=device, BITS=bits, ROWS=rows, DEPTH=64, COLUMNS=columns,
            num_warps=num_warps,
        )  # fmt: skip
    for case in products(quick):
        found[f"sums of {case}"] = ask(
            product_kernel, *matrices(case), shape=(case.rows, case.columns), dtype=torch.float32,
            device=device, ROWS=case.rows, DEPTH=case.depth, COLUMNS=case.columns,
            TRANSPOSED=int(case.is_transposed), num_warps=case.num_warps,
        )  # fmt: skip
    return found


def code_product_name(bits: int, rows: int, columns: int) -> str:
    return f"codes of {bits} bits times fp16, {rows}x64x{columns}"


# -- what is expected -----------------------------------------------------------------------------


def expected_codes(quick: bool) -> dict[str, NDArray]:
    """Bits of the fp16 numbers that codes are unpacked to."""
    codes = of_all_bytes().astype(np.uint16)
    found = {}
    for bits in (8, 4, 2, 1):
        mask, planes = (1 << bits) - 1, np.arange(8 // bits, dtype=np.uint16)[:, None]
        whole = (codes >> (planes * bits) & mask).astype(np.float16) - (128 if bits == 8 else 0)
        whole = whole.astype(np.float16).view(np.int16)
        kept = (codes & (mask << (planes * bits)).astype(np.uint16)).view(np.int16)
        found[f"shifted of {bits} bits"] = whole
        if bits > 1:
            found[f"planes of {bits} bits"] = kept
    lower, upper = (each.astype(np.int16) for each in byte_pairs(quick))
    plane = np.arange(4, dtype=np.int16)[:, None]
    for tile in (0, 1):
        third = upper >> (2 * plane + tile) & 1
        both = (lower >> 2 * plane & 3) | third << 2
        found[f"third bits, tile {tile}"] = (both << 2 * plane).astype(np.int16)
    return found


def rounded_bits(numbers: NDArray, name: str) -> NDArray:
    """float32 rounded to nearest even, by torch on a CPU."""
    return torch.from_numpy(numbers).to(DTYPES[name]).view(torch.int16).numpy()


def exact_function(name: str, quick: bool) -> NDArray:
    """In float64."""
    numbers, others = (each.astype(np.float64) for each in function_inputs(name, quick))
    if name == "ex2.approx":
        return np.exp2(numbers)
    if name == "lg2.approx":
        return np.log2(numbers)
    if name == "rcp.approx":
        return 1 / numbers
    return numbers / others if name.startswith("div") else numbers


def units_in_last_place(found: NDArray, exact: NDArray) -> float:
    """The greatest error; infinite where there is no number. What is subnormal may as well be 0."""
    units = np.spacing(np.maximum(np.abs(exact), 2 * LEAST_NORMAL).astype(np.float32))
    units = np.where(np.abs(exact) < 2 * LEAST_NORMAL, LEAST_NORMAL, units)
    errors = np.abs(found.astype(np.float64) - exact) / units
    return float(np.nan_to_num(errors, nan=np.inf).max())


def error_of_logarithms(found: NDArray, exact: NDArray) -> float:
    """The greatest, over what is allowed: 2^-22 or two units of the last place."""
    allowed = np.maximum(2 * np.spacing(np.abs(exact).astype(np.float32)), 2.0**-22)
    errors = np.abs(found.astype(np.float64) - exact) / allowed
    return float(np.nan_to_num(errors, nan=np.inf).max())


def number_differing(found: NDArray, expected: NDArray) -> float:
    """Numbers that differ in any bit, not a number being all alike."""
    return float((found != expected).sum() - (np.isnan(found) & np.isnan(expected)).sum())


def sum_error(case: Product, found: NDArray) -> float:
    """The greatest, in units of 2^-24 of the greatest product or partial sum of its element."""
    left, right, total = (each.double().numpy() for each in matrices(case))
    if case.is_transposed:
        found, total = found.reshape(total.shape), total.reshape(total.shape)
    terms = left[:, :, None] * right[None]
    partial = np.abs(total[:, None] + np.cumsum(terms, 1)).max(1)
    greatest = np.maximum(np.maximum(np.abs(terms).max(1), partial), np.abs(total))
    errors = np.abs(found - (terms.sum(1) + total)) / greatest
    return float(np.nan_to_num(errors, nan=np.inf).max() * 2.0**24)


def most_of_sums(case: Product) -> float:
    """Allowed: blocks of 8 products and a total, each cut off a bit behind float32's, then the sum.

    The greatest exponent may be one above that of the greatest product.
    """
    return case.depth / 8 * (2 * 9 + 2)


def row(case: str, metric: str, measured: float, allowed: float, unit: str) -> Row:
    return Row(
        case=case, metric=metric, value=min(measured, sys.float_info.max), unit=unit,
        baseline="allowed", baseline_value=allowed,
        ratio=None if measured <= allowed else allowed / measured,
    )  # fmt: skip


def rows_of(found: dict[str, NDArray], quick: bool) -> list[Row]:
    """A row of each answer. What is not as expected has a ratio, which is below 1."""
    rows = []
    for name, expected in expected_codes(quick).items():
        rows.append(row(name, "differ", number_differing(found[name], expected), 0, "numbers"))
    limits: dict[str, tuple[Callable[[NDArray, NDArray], float], str, float, str]] = {
        "ex2.approx": (units_in_last_place, "greatest error", 2, "ulp"),
        "lg2.approx": (error_of_logarithms, "greatest error", 1, "2 ulp, 2^-22"),
        "rcp.approx": (units_in_last_place, "greatest error", 1, "ulp"),
        "div.full": (units_in_last_place, "greatest error", 2, "ulp"),
        "div.rn": (units_in_last_place, "greatest error", 0.5, "ulp"),
        "of fp16": (number_differing, "differ", 0, "numbers"),
    }
    for name, (measure, metric, allowed, unit) in limits.items():
        measured = measure(found[name], exact_function(name, quick))
        rows.append(row(name, metric, measured, allowed, unit))
    for name in DTYPES:
        expected = rounded_bits(function_inputs(f"to {name}", quick)[0], name)
        differing = number_differing(found[f"to {name}"], expected)
        rows.append(row(f"to {name}", "differ", differing, 0, "numbers"))
    for bits, rows_of_codes, columns, _ in CODE_PRODUCTS:
        codes, queries = code_matrices(bits, rows_of_codes, 64, columns)
        whole = (codes & ((1 << bits) - 1)).astype(np.float64) * UNIT
        name = code_product_name(bits, rows_of_codes, columns)
        differing = number_differing(found[name], whole @ queries.double().numpy())
        rows.append(row(name, "differ from exact sums", differing, 0, "numbers"))
    for case in products(quick):
        error = sum_error(case, found[f"sums of {case}"])
        rows.append(row(f"sums of {case}", "greatest error", error, most_of_sums(case), "2^-24"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=Path, help="write all numbers to this .npz")
    add_arguments(parser)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = answers(arguments.quick, device)
    if arguments.answers:
        np.savez_compressed(arguments.answers, **found)
    rows = rows_of(found, arguments.quick)
    write_report("expectations", rows, arguments.json)
    wrong = [each.case for each in rows if each.ratio is not None]
    print(f"{len(wrong)} of {len(rows)} not as expected: {'; '.join(wrong) or 'none'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
