"""Vectors of eight float32 for numba's compiled functions, and the compiler they go through.

Left to itself LLVM makes vectors of few of the kernels' loops: they are short, and it cannot know that their arrays
do not overlap. A value of the type ``vector`` lives in registers (one of AVX, half a one of AVX-512, two of NEON).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model
from numba.np.arrayobj import make_array

LANES = 8

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_INTS = ir.VectorType(ir.IntType(32), LANES)
_FUSED = ("contract", "nsz")
"""A product and a sum may become one instruction. NaN and infinities stay what they are."""

_LOWEST = -32.0
"""Exponents are cut off there, as radial.lowest_exponent says."""

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
    """numba's type of eight float32."""

    def __init__(self) -> None:
        super().__init__(name="float32x8")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:  # noqa: ANN401 - numba's
        super().__init__(manager, kind, _FLOATS)


vector = Vector()


def compiled(function: Function) -> Function:
    """The function compiled on first use for this machine, without Python's lock, and kept on disk where that can be.

    numba keeps it beside the source or in the user's cache directory (NUMBA_CACHE_DIR); a container may have neither.
    """
    try:
        kept: Function = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no place for it: it is compiled again in every process
        kept = njit(nogil=True)(function)
    return kept


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401, ARG001
    """Eight numbers of a flat float32 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.load(_address(context, builder, signature, args), align=4)

    return vector(array, types.intp), code


@intrinsic
def broadcast(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401, ARG001
    """The number of a flat float32 array at ``index`` eight times; unlike Python's, never counted from the end."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        data = make_array(signature.args[0])(context, builder, args[0]).data
        return _splat(builder, builder.load(builder.gep(data, [args[1]])))

    return vector(array, types.intp), code


@intrinsic
def prefetch(typing: Any, array: Any, index: Any) -> Typed:  # noqa: ANN401, ARG001
    """Have the numbers around ``index`` of a flat float32 array brought to the cache."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        data = make_array(signature.args[0])(context, builder, args[0]).data
        address = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [address, flag(0), flag(3), flag(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), code


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Typed:  # noqa: ANN401, ARG001
    """Write eight numbers to a flat float32 array from ``index`` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        builder.store(args[2], _address(context, builder, signature, args), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def transpose(typing: Any, source: Any, at: Any, step: Any, target: Any, to: Any, stride: Any) -> Typed:  # noqa: ANN401, ARG001
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
                rows[row] = builder.shuffle_vector(a, b, ir.Constant(_INTS, low))
                rows[row + apart] = builder.shuffle_vector(a, b, ir.Constant(_INTS, high))
        for row, values in enumerate(rows):
            builder.store(values, address(3, row), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), code


@intrinsic
def splat(typing: Any, value: Any) -> Typed:  # noqa: ANN401, ARG001
    """One float32 eight times."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return _splat(builder, args[0])

    return vector(types.float32), code


@intrinsic
def ramp(typing: Any) -> Typed:  # noqa: ANN401, ARG001
    """0, 1, … 7."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return ir.Constant(_FLOATS, [float(lane) for lane in range(LANES)])

    return vector(), code


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Typed:  # noqa: ANN401, ARG001
    """a b + c."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return _fma(builder, *args)

    return vector(vector, vector, vector), code


@intrinsic
def mul(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401, ARG001
    """a b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return builder.fmul(*args, flags=_FUSED)

    return vector(vector, vector), code


@intrinsic
def add(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401, ARG001
    """a + b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return builder.fadd(*args, flags=_FUSED)

    return vector(vector, vector), code


@intrinsic
def sub(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401, ARG001
    """a - b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return builder.fsub(*args, flags=_FUSED)

    return vector(vector, vector), code


@intrinsic
def div(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401, ARG001
    """a / b."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return builder.fdiv(*args)

    return vector(vector, vector), code


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Typed:  # noqa: ANN401, ARG001
    """The larger of a and b, lane by lane."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return vector(vector, vector), code


@intrinsic
def exp(typing: Any, x: Any) -> Typed:  # noqa: ANN401, ARG001
    """e^x of x <= 0 to 1.5e-7 of itself; e^-32 for all x below -32, NaN for NaN."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401, ARG001
        low = _floats(_LOWEST)
        x = builder.select(builder.fcmp_unordered("<", low, args[0]), args[0], low)
        power = builder.fptosi(_fma(builder, x, _floats(_LOG2_E), _floats(-0.5)), _INTS)
        whole = builder.sitofp(power, _FLOATS)
        rest = _fma(builder, whole, _floats(-_LN2_LOW), _fma(builder, whole, _floats(-_LN2_HIGH), x))
        series = _floats(_EXPONENTIAL[0])
        for factor in _EXPONENTIAL[1:]:
            series = _fma(builder, series, rest, _floats(factor))
        square = builder.fmul(rest, rest, flags=_FUSED)
        mantissa = _fma(builder, series, square, builder.fadd(rest, _floats(1.0), flags=_FUSED))
        scale = builder.bitcast(builder.shl(builder.add(power, _ints(127)), _ints(23)), _FLOATS)
        return builder.fmul(mantissa, scale, flags=_FUSED)

    return vector(vector), code


def _address(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
    """Of the vector at ``args[1]`` in the array ``args[0]``."""
    data = make_array(signature.args[0])(context, builder, args[0]).data
    return builder.bitcast(builder.gep(data, [args[1]]), _FLOATS.as_pointer())


def _splat(builder: Any, value: Any) -> Any:  # noqa: ANN401
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, nothing, _ints(0))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:  # noqa: ANN401
    return builder.fadd(builder.fmul(a, b, flags=_FUSED), c, flags=_FUSED)


def _floats(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)
