"""Vectors of eight and of sixteen float32 for numba's compiled functions, and the compiler they go through.

Left to itself LLVM makes vectors of few of the kernels' loops: they are short, and it cannot know that their arrays
do not overlap. A value of the type ``vector`` (eight) or ``wide`` (sixteen) lives in registers: a wide one in one of
AVX-512, two of AVX, four of NEON. Arithmetic takes either, both operands alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import binding, ir
from numba import njit, types
from numba.core import config
from numba.core.datamodel import models
from numba.extending import intrinsic, register_jitable, register_model
from numba.np.arrayobj import make_array

from crystalformer.ops.numba.kept import Kept, stamp_of_code

LANES = 8
WIDE = 16
"""Numbers in a vector of either kind."""


def _has_wide_registers() -> bool:
    """Whether 32 registers hold sixteen numbers each, or else sixteen hold eight or 32 hold four."""
    if config.CPU_FEATURES is not None:
        return "+avx512f" in config.CPU_FEATURES
    return bool(binding.get_host_cpu_features().get("avx512f"))


WIDE_REGISTERS = _has_wide_registers()
"""Whether a kernel may keep eight wide vectors and more."""

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WIDE = ir.VectorType(ir.FloatType(), WIDE)
_FUSED = ("contract", "nsz")
"""A product and a sum may become one instruction. NaN and infinities stay what they are."""

_LOWEST = -32.0
"""Exponentials end there, as radial.lowest_exponent says."""

_LOG2_E = 1.4426950216293335
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.1219444170128554e-4
"""log2(e), and ln 2 in two parts whose first times a small integer is exact; float32 numbers."""

_EXPONENTIAL = (1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5)
"""Taylor's series of (e^r - 1 - r) / r² on |r| <= ln 2 / 2: the first term left out is 5e-9 of the result."""

Code = Callable[[Any, Any, Any, Any], Any]
Typed = tuple[Any, Code]
Function = TypeVar("Function", bound=Callable[..., Any])


class Vector(types.Type):
    """numba's type of so many float32."""

    def __init__(self, lanes: int) -> None:
        super().__init__(name=f"float32x{lanes}")
        self.lanes = lanes


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:  # noqa: ANN401 - numba's
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), kind.lanes))


vector, wide = Vector(LANES), Vector(WIDE)


def compiled(function: Function) -> Function:
    """The function compiled on first use for this machine, without Python's lock, and kept on disk where that can be.

    numba keeps it beside the source or in the user's cache directory (NUMBA_CACHE_DIR); a container may have neither.
    """
    try:
        kept: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no place for it: it is compiled again in every process
        kept = njit(nogil=True)(function)
    else:
        # numba asks whether the function's own file has changed, while functions of the other files are compiled into
        # it, and names what it keeps after the function alone: one version's index, cut off before its code was
        # written, or a node with another processor and the same home would lead to code that is not meant.
        cache, stamp = kept._cache, stamp_of_code()
        cache._cache_file = Kept(cache._cache_path, f"{cache._impl.filename_base}-{stamp[:16]}", stamp)
    result: Function = kept
    return result


def inlined(function: Function) -> Function:
    """The function as part of every compiled one that calls it: a call counts who holds the arrays."""
    part: Function = njit(inline="always")(function)
    return part


def either(function: Function) -> Function:
    """The function, for Python as for compiled ones."""
    both: Function = register_jitable(function)
    return both


@inlined
def halves(a: Any) -> Any:  # noqa: ANN401 - a wide vector, and one of eight
    """The sum of the first eight lanes of sixteen and the last eight."""
    return add(former(a), latter(a))


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401
    """Eight numbers of a flat float32 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.load(_address(context, builder, signature, args, _FLOATS), align=4)

    return vector(array, types.intp), code


@intrinsic
def load_wide(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401
    """Sixteen numbers of a flat float32 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.load(_address(context, builder, signature, args, _WIDE), align=4)

    return wide(array, types.intp), code


@intrinsic
def load_twice(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401
    """Eight numbers of a flat float32 array from ``index`` on, and once more."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        eight = builder.load(_address(context, builder, signature, args, _FLOATS), align=4)
        return _shuffled(builder, eight, [lane % LANES for lane in range(WIDE)])

    return wide(array, types.intp), code


@intrinsic
def load_pairs(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401
    """Two numbers of a flat float32 array from ``index`` on, eight times in turn."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        address = _address(context, builder, signature, args, ir.VectorType(ir.FloatType(), 2))
        return _shuffled(builder, builder.load(address, align=4), [lane % 2 for lane in range(WIDE)])

    return wide(array, types.intp), code


@intrinsic
def broadcast(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401
    """The number of a flat float32 array at ``index`` eight times; unlike Python's, never counted from the end."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        data = make_array(signature.args[0])(context, builder, args[0]).data
        return splat_of(builder, builder.load(builder.gep(data, [args[1]])))

    return vector(array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Typed:  # noqa: ANN401
    """Write a vector's numbers to a flat float32 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        builder.store(args[2], _address(context, builder, signature, args, args[2].type), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), code


@intrinsic
def stream(typing: Any, array: Any, index: Any, value: Any) -> Typed:  # noqa: ANN401
    """Write a wide vector past the caches; index: of the beginning of a line. ``settle`` has other threads see it."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        written = builder.store(args[2], _address(context, builder, signature, args, args[2].type), align=64)
        written.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(array, types.intp, value), code


@intrinsic
def settle(typing: Any) -> Typed:  # noqa: ANN401
    """What this thread has written is there before what it writes after."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def transpose(typing: Any, source: Any, at: Any, step: Any, target: Any, to: Any, stride: Any) -> Typed:  # noqa: ANN401
    """Read eight rows of eight numbers, ``step`` apart from ``at`` on, and write their columns, ``stride`` apart.

    Both are flat float32 arrays.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        def address(array: int, row: int) -> Any:  # noqa: ANN401
            index = builder.add(args[array + 1], builder.mul(args[array + 2], ir.Constant(args[array + 2].type, row)))
            data = make_array(signature.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [index]), _FLOATS.as_pointer())

        rows = [builder.load(address(0, row), align=4) for row in range(LANES)]
        for apart in (1, 2, 4):
            for row in (row for row in range(LANES) if not row & apart):
                a, b = rows[row], rows[row + apart]
                low = [lane + LANES - apart if lane & apart else lane for lane in range(LANES)]
                high = [lane + LANES if lane & apart else lane + apart for lane in range(LANES)]
                rows[row] = _shuffled(builder, a, low, b)
                rows[row + apart] = _shuffled(builder, a, high, b)
        for row, values in enumerate(rows):
            builder.store(values, address(3, row), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), code


@intrinsic
def splat(typing: Any, value: Any) -> Typed:  # noqa: ANN401
    """One float32 eight times."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return splat_of(builder, args[0])

    return vector(types.float32), code


@intrinsic
def splat_wide(typing: Any, value: Any) -> Typed:  # noqa: ANN401
    """One float32 sixteen times."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return splat_of(builder, args[0], WIDE)

    return wide(types.float32), code


def _lanes_of_one(lanes: list[int]) -> Any:  # noqa: ANN401
    """A function of a vector: those of its lanes."""

    @intrinsic
    def take(typing: Any, a: Any) -> Typed:  # noqa: ANN401
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            return _shuffled(builder, args[0], lanes)

        return (wide if len(lanes) == WIDE else vector)(a), code

    return take


def _lanes_of_two(lanes: list[int]) -> Any:  # noqa: ANN401
    """A function of two vectors of eight: those of their sixteen lanes."""

    @intrinsic
    def take(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            return _shuffled(builder, args[0], lanes, args[1])

        return wide(a, b), code

    return take


doubled = _lanes_of_one([lane // 2 for lane in range(WIDE)])
former, latter = _lanes_of_one(list(range(LANES))), _lanes_of_one(list(range(LANES, WIDE)))
evens, odds = _lanes_of_one(list(range(0, WIDE, 2))), _lanes_of_one(list(range(1, WIDE, 2)))
joined = _lanes_of_two(list(range(WIDE)))
interleaved = _lanes_of_two([lane // 2 + lane % 2 * LANES for lane in range(WIDE)])
"""Of eight lanes each twice in succession; of sixteen the first and the last eight, those at even and at odd places;
two times eight one after the other, and in turn: a0, b0, a1, b1, …."""


@intrinsic
def ramp(typing: Any) -> Typed:  # noqa: ANN401
    """0, 1, … 15."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return ir.Constant(_WIDE, [float(lane) for lane in range(WIDE)])

    return wide(), code


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Typed:  # noqa: ANN401
    """a b + c."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return sum_of_product(builder, *args)

    return a(a, b, c), code


@intrinsic
def mul(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401
    """a b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.fmul(*args, flags=_FUSED)

    return a(a, b), code


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401
    """a + b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.fadd(*args, flags=_FUSED)

    return a(a, b), code


@intrinsic
def sub(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401
    """a - b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.fsub(*args, flags=_FUSED)

    return a(a, b), code


@intrinsic
def div(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401
    """a / b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.fdiv(*args)

    return a(a, b), code


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401
    """The larger of a and b, lane by lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, b), code


@intrinsic
def where_above(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401
    """b where a is not 0 or less, lane by lane, elsewhere 0."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        zero = ir.Constant(args[0].type, [0.0] * args[0].type.count)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), zero, args[1])

    return a(a, b), code


@intrinsic
def exp(typing: Any, a: Any) -> Typed:  # noqa: ANN401
    """e^x of x <= 0 to 1.5e-7 of itself; 0 for x of -32 and below, NaN for NaN."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        kind = args[0].type
        whole_kind = ir.VectorType(ir.IntType(32), kind.count)

        def floats(value: float) -> ir.Constant:
            return ir.Constant(kind, [value] * kind.count)

        low = floats(_LOWEST)
        counts = builder.fcmp_unordered("<", low, args[0])
        x = builder.select(counts, args[0], low)
        power = builder.fptosi(sum_of_product(builder, x, floats(_LOG2_E), floats(-0.5)), whole_kind)
        whole = builder.sitofp(power, kind)
        rest = sum_of_product(
            builder, whole, floats(-_LN2_LOW), sum_of_product(builder, whole, floats(-_LN2_HIGH), x)
        )
        series = floats(_EXPONENTIAL[0])
        for factor in _EXPONENTIAL[1:]:
            series = sum_of_product(builder, series, rest, floats(factor))
        square = builder.fmul(rest, rest, flags=_FUSED)
        mantissa = sum_of_product(builder, series, square, builder.fadd(rest, floats(1.0), flags=_FUSED))
        biased = builder.add(power, ir.Constant(whole_kind, [127] * kind.count))
        scale = builder.bitcast(builder.shl(biased, ir.Constant(whole_kind, [23] * kind.count)), kind)
        return builder.select(counts, builder.fmul(mantissa, scale, flags=_FUSED), floats(0.0))

    return a(a), code


def _address(context: Any, builder: Any, signature: Any, args: Any, kind: Any) -> Any:  # noqa: ANN401
    """Of the vector of that kind at ``args[1]`` in the array ``args[0]``."""
    data = make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), kind.as_pointer())


def vector_of(builder: Any, address: Any, lanes: int) -> Any:  # noqa: ANN401
    """In code: the address of a number as that of so many."""
    return builder.bitcast(address, ir.VectorType(ir.FloatType(), lanes).as_pointer())


def splat_of(builder: Any, value: Any, lanes: int = LANES) -> Any:  # noqa: ANN401
    """In code: a number so many times."""
    nothing = ir.Constant(ir.VectorType(ir.FloatType(), lanes), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return _shuffled(builder, first, [0] * lanes)


def _shuffled(builder: Any, a: Any, lanes: list[int], b: Any = None) -> Any:  # noqa: ANN401
    """A vector of those lanes of a and, counted on from its last, of b."""
    second = ir.Constant(a.type, ir.Undefined) if b is None else b
    return builder.shuffle_vector(a, second, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def sum_of_product(builder: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401
    """In code: a b + c."""
    return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)
