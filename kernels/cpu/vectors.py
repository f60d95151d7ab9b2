"""Write machine code with explicit vectors: a small emitter over LLVM.

Knows vectors and loops, nothing of attention. LLVM comes with numba (llvmlite), so no compiler is
needed. Where a machine has no vectors, LLVM turns them into plain instructions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from typing import Any, Final

import llvmlite
import numpy as np
from llvmlite import binding, ir

from ...code_cache import read_code, write_code

CACHE_LINE: Final = 64
BYTE: Final[Any] = ir.IntType(8)
SHORT: Final[Any] = ir.IntType(16)
INT: Final[Any] = ir.IntType(32)
LONG: Final[Any] = ir.IntType(64)
HALF: Final[Any] = ir.HalfType()
FLOAT: Final[Any] = ir.FloatType()


@cache
def host_width() -> int:
    """Lanes of a float32 vector on this machine: 16 (AVX-512), 8 (AVX) or 4."""
    features = host_features()
    if "+avx512f" in features:
        return 16
    return 8 if "+avx" in features else 4


@cache
def host_features() -> tuple[str, ...]:
    """What this machine's processor can do, as LLVM names it; sorted, so that it can be a key."""
    flags = os.environ.get("NUMBA_CPU_FEATURES") or binding.get_host_cpu_features().flatten()
    return tuple(sorted(flags.split(",")))


def host_name() -> str:
    return os.environ.get("NUMBA_CPU_NAME") or str(binding.get_host_cpu_name())


class Emitter:
    """Writes one function of 64-bit integer arguments: addresses, counts and flags.

    Values are LLVM values; addresses are integers, offsets of Python ints are folded in.
    """

    def __init__(self, name: str, num_arguments: int) -> None:
        self.module: Any = ir.Module(name=name)
        signature = ir.FunctionType(ir.VoidType(), [LONG] * num_arguments)
        self.function: Any = ir.Function(self.module, signature, name=name)
        self.arguments: tuple[Any, ...] = self.function.args
        self._entry = self.function.append_basic_block("entry")
        self.builder: Any = ir.IRBuilder(self.function.append_basic_block("body"))

    def finish(self) -> str:
        """The function as LLVM's text."""
        self.builder.ret_void()
        ir.IRBuilder(self._entry).branch(self.function.basic_blocks[1])
        return str(self.module)

    # -- numbers and addresses --------------------------------------------------------------

    def long(self, value: int) -> Any:
        return ir.Constant(LONG, value)

    def offset(self, address: Any, *terms: Any) -> Any:
        """`address` plus byte offsets, each an int or a value."""
        for term in terms:
            if not isinstance(term, int):
                address = self.builder.add(address, term)
            elif term:
                address = self.builder.add(address, self.long(term))
        return address

    def times(self, value: Any, factor: int) -> Any:
        return self.builder.mul(value, self.long(factor))

    # -- memory -----------------------------------------------------------------------------

    def load(self, address: Any, kind: Any, lanes: int | None = None) -> Any:
        """A scalar, or a vector of `lanes`, from any byte address."""
        if lanes is not None:
            kind = ir.VectorType(kind, lanes)
        return self.builder.load(self._pointer(address, kind), align=1, typ=kind)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self._pointer(address, value.type), align=1)

    def prefetch(self, address: Any) -> None:
        """Bring the cache line at `address`, which need not be valid, towards the processor."""
        pointer = BYTE.as_pointer()
        function = self._intrinsic("llvm.prefetch.p0", ir.VoidType(), [pointer, INT, INT, INT])
        # To read, into the second cache, data.
        flags = [ir.Constant(INT, flag) for flag in (0, 2, 1)]
        self.builder.call(function, [self._pointer(address, BYTE), *flags])

    def _pointer(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def variable(self, value: Any) -> Any:
        """A place for a value that changes in a loop; a register after optimization."""
        with self.builder.goto_block(self._entry):
            place = self.builder.alloca(value.type)
        self.builder.store(value, place)
        return place

    # -- control ----------------------------------------------------------------------------

    @contextmanager
    def loop(self, start: Any, stop: Any, step: int) -> Iterator[Any]:
        """Count from `start` while below `stop`."""
        with self.loop_by(start, stop, self.long(step)) as index:
            yield index

    @contextmanager
    def loop_by(self, start: Any, stop: Any, step: Any) -> Iterator[Any]:
        """`loop` with a step that is a value."""
        head, body, done = (self.builder.append_basic_block(n) for n in ("head", "body", "done"))
        counter = self.variable(start)
        self.builder.branch(head)
        self.builder.position_at_end(head)
        index = self.builder.load(counter)
        self.builder.cbranch(self.builder.icmp_signed("<", index, stop), body, done)
        self.builder.position_at_end(body)
        yield index
        self.builder.store(self.builder.add(index, step), counter)
        self.builder.branch(head)
        self.builder.position_at_end(done)

    # -- vectors ----------------------------------------------------------------------------

    def splat(self, value: Any, lanes: int) -> Any:
        undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
        first = self.builder.insert_element(undefined, value, ir.Constant(INT, 0))
        zeros = ir.Constant(ir.VectorType(INT, lanes), [0] * lanes)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def constant(self, value: float, lanes: int) -> Any:
        return ir.Constant(ir.VectorType(FLOAT, lanes), [float(np.float32(value))] * lanes)

    def integers(self, value: int, kind: Any, lanes: int) -> Any:
        return ir.Constant(ir.VectorType(kind, lanes), [value] * lanes)

    def lane_numbers(self, lanes: int) -> Any:
        return ir.Constant(ir.VectorType(INT, lanes), list(range(lanes)))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a * b + c, rounded once where the machine can."""
        return self._vector_call("llvm.fmuladd", a, b, c)

    def maximum(self, a: Any, b: Any) -> Any:
        """One instruction: the second where either is not a number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def strict_maximum(self, a: Any, b: Any) -> Any:
        """Not a number where either is not."""
        return self._vector_call("llvm.maximum", a, b)

    def strict_minimum(self, a: Any, b: Any) -> Any:
        return self._vector_call("llvm.minimum", a, b)

    def absolute(self, vector: Any) -> Any:
        return self._vector_call("llvm.fabs", vector)

    def round_to_even(self, vector: Any) -> Any:
        return self._vector_call("llvm.rint", vector)

    def reduce(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """One scalar from all lanes, halving."""
        return self.builder.extract_element(self.halved(vector, 1, combine), ir.Constant(INT, 0))

    def halved(
        self, vector: Any, lanes: int, combine: Callable[[Any, Any], Any] | None = None
    ) -> Any:
        """The halves of a vector combined (added), and theirs, until `lanes` are left."""
        combine = combine or self.builder.fadd
        while vector.type.count > lanes:
            half = vector.type.count // 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            low, high = (
                ir.Constant(ir.VectorType(INT, half), list(range(first, first + half)))
                for first in (0, half)
            )
            vector = combine(
                self.builder.shuffle_vector(vector, undefined, low),
                self.builder.shuffle_vector(vector, undefined, high),
            )
        return vector

    def half_to_float(self, vector: Any) -> Any:
        return self.builder.fpext(vector, ir.VectorType(FLOAT, vector.type.count))

    def exp2(self, vector: Any) -> Any:
        """2 ** vector for values of at most 0, with a relative error of 2e-7; 1e-38 far below.

        Split into an integer and a fraction within [-0.5, 0.5]; the polynomial is the fraction's
        least relative error of degree 6, fitted by Chebyshev nodes.
        """
        builder, lanes = self.builder, vector.type.count
        vector = self.maximum(self.constant(-126.0, lanes), vector)  # what is no number stays so
        whole = self.round_to_even(vector)
        fraction = builder.fsub(vector, whole)
        result = self.constant(EXP2_COEFFICIENTS[0], lanes)
        for coefficient in EXP2_COEFFICIENTS[1:]:
            result = self.fma(result, fraction, self.constant(coefficient, lanes))
        integers = ir.VectorType(INT, lanes)
        exponent = builder.shl(builder.fptosi(whole, integers), ir.Constant(integers, [23] * lanes))
        bits = builder.add(builder.bitcast(result, integers), exponent)
        return builder.bitcast(bits, ir.VectorType(FLOAT, lanes))

    def call(self, name: str, result: Any, *values: Any) -> Any:
        """One of LLVM's intrinsics."""
        function = self._intrinsic(name, result, [value.type for value in values])
        return self.builder.call(function, values)

    def _vector_call(self, name: str, *values: Any) -> Any:
        kind = values[0].type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self.call(f"{name}.{suffix}", kind, *values)

    def _intrinsic(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        existing = self.module.globals.get(name)
        if existing is not None:
            return existing
        return ir.Function(self.module, ir.FunctionType(result, arguments), name=name)


def exp2_coefficients(degree: int) -> tuple[float, ...]:
    """Of a polynomial for 2 ** x on [-0.5, 0.5], highest power first."""
    polynomial = np.polynomial.Chebyshev.interpolate(
        lambda x: np.exp2(x), degree, domain=[-0.5, 0.5]
    )
    return tuple(polynomial.convert(kind=np.polynomial.Polynomial).coef[::-1].tolist())


EXP2_COEFFICIENTS: Final = exp2_coefficients(6)


class MachineCode:
    """A compiled function and where it is: its memory lives as long as this object."""

    def __init__(self, name: str, text: str) -> None:
        self._engine = _compile(text)
        self.address: int = int(self._engine.get_function_address(name))


def _compile(text: str) -> binding.ExecutionEngine:
    """Machine code for LLVM's text, from the disk if it was compiled before on such a machine."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=host_name(), features=",".join(host_features()), opt=3, jit=True
    )
    key = "\n".join([text, host_name(), *host_features(), llvmlite.__version__])
    name = f"{sha256(key.encode()).hexdigest()}.o"
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    stored = read_code(name)
    if stored is not None:
        engine.add_object_file(binding.ObjectFileRef.from_data(stored))
    else:
        module = binding.parse_assembly(text)
        options = binding.create_pipeline_tuning_options(speed_level=3)
        options.loop_unrolling = options.slp_vectorization = options.loop_vectorization = False
        passes = binding.create_pass_builder(machine, options)
        passes.getModulePassManager().run(module, passes)
        code = machine.emit_object(module)
        write_code(name, code)
        engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine
