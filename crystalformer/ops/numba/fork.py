"""Compiled code in several threads at once, without Python between them: ``fork``, and ``claim`` to deal out work."""

from __future__ import annotations

from itertools import count
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from crystalformer.ops.numba.simd import Typed

_BYTES = ir.IntType(8).as_pointer()
_THREAD = ir.FunctionType(ir.VoidType(), [_BYTES])
_PARALLEL = ir.FunctionType(ir.VoidType(), [_THREAD.as_pointer(), _BYTES, ir.IntType(32), ir.IntType(32)])
"""GOMP_parallel's: what to call, with what, in how many threads, flags."""

_names = count()


@intrinsic
def fork(typing: Any, function: Any, parallel: Any, threads: Any, arguments: Any) -> Typed:  # noqa: ANN401
    """Call a compiled function with a tuple of arguments in ``threads`` threads at once, this one among them.

    parallel: address of a function like OpenMP's GOMP_parallel, not asked for one thread. The arrays are lent: if
    every thread counted who holds them, all would write to one place in turn, a fifth of the kernels' time. Raises
    RuntimeError where a thread raised anything.
    """
    if not isinstance(function, types.Dispatcher) or not isinstance(arguments, types.BaseTuple):
        raise TypingError("fork takes a compiled function and a tuple")
    own = function.get_call_type(typing, tuple(arguments), {})

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        made = function.dispatcher.get_compile_result(own)
        context.add_linking_libs([made.library])
        shared = ir.LiteralStructType([args[3].type, ir.IntType(32)])
        entry = _entry(context, builder, made.fndesc, own, shared)
        data = cgutils.alloca_once(builder, shared)
        builder.store(args[3], cgutils.gep_inbounds(builder, data, 0, 0))
        failed = cgutils.gep_inbounds(builder, data, 0, 1)
        builder.store(ir.IntType(32)(0), failed)
        given, number = builder.bitcast(data, _BYTES), builder.trunc(args[2], ir.IntType(32))
        with builder.if_else(builder.icmp_signed(">", number, ir.IntType(32)(1))) as (several, alone):
            with several:
                team = builder.inttoptr(args[1], _PARALLEL.as_pointer())
                builder.call(team, [entry, given, number, ir.IntType(32)(0)])
            with alone:
                builder.call(entry, [given])
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, builder.load(failed))):
            context.call_conv.return_user_exc(builder, RuntimeError, ("a thread of the attention kernels failed",))
        return context.get_dummy_value()

    return types.void(function, types.intp, types.intp, arguments), code


def _entry(context: Any, builder: Any, callee: Any, signature: Any, shared: Any) -> Any:  # noqa: ANN401
    """The function that a thread begins with: unpacks the arguments, calls, and notes a failure."""
    name = f"{builder.function.name}.thread.{next(_names)}"
    function = ir.Function(builder.module, _THREAD, name)
    function.linkage = "internal"
    inner = ir.IRBuilder(function.append_basic_block("entry"))
    data = inner.bitcast(function.args[0], shared.as_pointer())
    values = cgutils.unpack_tuple(inner, inner.load(cgutils.gep_inbounds(inner, data, 0, 0)))
    lent = [_lent(inner, kind, value) for kind, value in zip(signature.args, values, strict=True)]
    status, _ = context.call_internal_no_propagate(inner, callee, signature, lent)
    with inner.if_then(status.is_error, likely=False):
        inner.store(ir.IntType(32)(1), cgutils.gep_inbounds(inner, data, 0, 1))
    inner.ret_void()
    return function


def _lent(builder: Any, kind: Any, value: Any) -> Any:  # noqa: ANN401
    """The value with arrays, also those in tuples, whose holders are not counted."""
    if isinstance(kind, types.Array):
        for owner in (0, 1):  # what counts the holders, and the object of Python's
            value = builder.insert_value(value, ir.Constant(value.type.elements[owner], None), owner)
    elif isinstance(kind, types.BaseTuple):
        for at, member in enumerate(kind):
            value = builder.insert_value(value, _lent(builder, member, builder.extract_value(value, at)), at)
    return value


@intrinsic
def claim(typing: Any, counter: Any) -> Typed:  # noqa: ANN401
    """The number in an int64 array's first place, which is then one more; each thread gets another one."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        data = make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.IntType(64)(1), "monotonic")

    return types.int64(counter), code
