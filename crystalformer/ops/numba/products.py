"""Products of matrices so small that calling a library takes as long as multiplying.

A tile of at most six rows and 64 columns (16 where registers are fewer) is summed in registers. Every number of a
product has one order of summation, whatever other rows are computed with it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from crystalformer.ops.numba.pairs import Floats
from crystalformer.ops.numba.simd import (
    LANES,
    WIDE,
    WIDE_REGISTERS,
    Typed,
    add,
    compiled,
    either,
    inlined,
    load_wide,
    splat_of,
    splat_wide,
    store,
    sum_of_product,
    transpose,
    vector_of,
)

ROWS = 6
"""Most rows of a tile."""

PANEL = 64
"""Columns that lie side by side in a packed matrix."""

DEPTH = 256
"""Rows of a second factor that are summed over at a time: those of more, and of 64 columns, would leave the cache."""


NEAR = 128
"""Rows of both factors of a long product that are copied at a time: 64 columns of them fit into the first cache."""


class Matrix(NamedTuple):
    """A matrix in a flat array: where it begins, numbers between rows, between columns, and between 64 columns.

    Of a second factor and a result, columns lie side by side, at least by panels of 64.
    """

    values: Floats
    at: int
    row: int
    step: int
    panel: int


@inlined
def matrix(values: Floats, at: int, row: int) -> Matrix:
    """With rows of ``row`` numbers from ``at`` on."""
    return Matrix(values, at, row, 1, PANEL)


@inlined
def turned(values: Floats, at: int, row: int) -> Matrix:
    """The transpose of one with rows of ``row`` numbers, from ``at`` on; a first factor only."""
    return Matrix(values, at, 1, row, PANEL * row)


@inlined
def packed(values: Floats, at: int, depth: int) -> Matrix:
    """What ``pack`` made of a matrix with rows of ``depth`` numbers: its transpose."""
    return Matrix(values, at, PANEL, 1, PANEL * depth)


@either
def packed_size(rows: int, depth: int) -> int:
    """Numbers in the packed form of a matrix with so many rows."""
    return -(-rows // PANEL) * PANEL * depth


@compiled
def pack(values: Floats, depth: int, first: int, last: int, out: Floats, at: int) -> None:
    """Write the transpose of rows first..last-1, of ``depth`` numbers, in panels; all of them multiples of eight."""
    for row in range(first, last, LANES):
        to = at + row // PANEL * PANEL * depth + row % PANEL
        for k in range(0, depth, LANES):
            transpose(values, row * depth + k, depth, out, to + k * PANEL, PANEL)


@inlined
def set_product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, int, int]) -> None:
    """Write a b to c; shape: rows of a, columns of b (a multiple of 16), depth."""
    _multiply(a, b, c, shape, False)  # noqa: FBT003


@inlined
def add_product(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, int, int]) -> None:
    """Add a b to c; shape as ``set_product``'s."""
    _multiply(a, b, c, shape, True)  # noqa: FBT003


@compiled
def _multiply(a: Matrix, b: Matrix, c: Matrix, shape: tuple[int, int, int], added: bool) -> None:  # noqa: FBT001
    rows, columns, depth = shape
    for first in range(0, depth, DEPTH):
        part, begun = min(DEPTH, depth - first), added or first > 0
        column = 0
        while column < columns:
            wide = column + TILE <= columns
            for row in range(0, rows, ROWS):
                if wide:
                    _tile(a, b, c, min(ROWS, rows - row), (row, column, first), part, begun)
                else:
                    _narrow_tile(a, b, c, min(ROWS, rows - row), (row, column, first), part, begun)
            column += TILE if wide else WIDE


@compiled
def set_long_product(
    a: Matrix, b: Matrix, c: Matrix, totals: Floats, shape: tuple[int, int, int], room: Floats
) -> None:
    """``set_product`` of a turned ``a`` over a depth that no cache holds; and the sums of a's rows to ``totals``.

    Parts of a and b are copied to ``room``, of ``room_for`` rows, so that what a tile reads lies together. rows: a
    multiple of 8.
    """
    rows, columns, depth = shape
    near_a, sums = Matrix(room, 0, NEAR, 1, NEAR), rows * NEAR
    near_b = Matrix(room, sums + rows * WIDE, PANEL, 1, PANEL * NEAR)
    for x in range(sums, sums + rows * WIDE, WIDE):
        store(room, x, splat_wide(np.float32(0.0)))
    for first in range(0, depth, NEAR):
        part = min(NEAR, depth - first)
        _copy_turned(a, first, part, rows, room)
        for row in range(rows):
            total = load_wide(room, sums + row * WIDE)
            for k in range(row * NEAR, row * NEAR + part, WIDE):
                total = add(total, load_wide(room, k))
            store(room, sums + row * WIDE, total)
        for column in range(0, columns, PANEL):
            width = min(PANEL, columns - column)
            for k in range(part):
                at, to = b.at + (first + k) * b.row + column, near_b.at + k * PANEL
                for x in range(0, width, WIDE):
                    store(room, to + x, load_wide(b.values, at + x))
            out = Matrix(c.values, c.at + column, c.row, 1, PANEL)
            _multiply(near_a, near_b, out, (rows, width, part), first > 0)
    for row in range(rows):
        totals[row] = room[sums + row * WIDE : sums + (row + 1) * WIDE].sum()


@compiled
def _copy_turned(a: Matrix, first: int, part: int, rows: int, room: Floats) -> None:
    """Write columns first..first+part-1 of a turned ``a`` to room (rows, NEAR), with zeros to a whole wide vector."""
    whole = part // LANES * LANES
    for row in range(0, rows, LANES):
        for k in range(0, whole, LANES):
            transpose(a.values, a.at + (first + k) * a.step + row, a.step, room, row * NEAR + k, NEAR)
        for r in range(row, row + LANES):
            for k in range(whole, part):
                room[r * NEAR + k] = a.values[a.at + (first + k) * a.step + r]
            for k in range(part, -(-part // WIDE) * WIDE):
                room[r * NEAR + k] = 0.0


@either
def room_for(rows: int) -> int:
    """Numbers that ``set_long_product`` needs for so many rows."""
    return rows * (NEAR + WIDE) + PANEL * NEAR


TILE = PANEL if WIDE_REGISTERS else WIDE
"""Columns of a tile: its sums are in 24 of the registers, or 12 of 16."""


class _Place(NamedTuple):
    """What a tile's code is built from: a Matrix's first number there, and its steps, as LLVM's values."""

    first: Any
    row: Any
    step: Any


def _tiles(columns: int) -> Any:  # noqa: ANN401
    """A function that computes a tile of so many columns."""
    wides = columns // WIDE

    @intrinsic
    def tile(typing: Any, a: Any, b: Any, c: Any, rows: Any, place: Any, depth: Any, added: Any) -> Typed:  # noqa: ANN401
        """``rows`` (1 to 6) of a b, over ``depth``, from ``place`` on: a row, a column, and a place in the depth."""

        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
            row, column, first = cgutils.unpack_tuple(builder, args[4])

            def at(number: int, r: Any, c: Any) -> _Place:  # noqa: ANN401
                return _place(context, builder, signature.args[number], args[number], r, c)

            places = at(0, row, first), at(1, first, column), at(2, row, column)
            end = builder.append_basic_block("end")
            choice = builder.switch(args[3], end)
            for count in range(1, ROWS + 1):
                block = builder.append_basic_block(f"rows.{count}")
                choice.add_case(ir.Constant(args[3].type, count), block)
                with builder.goto_block(block):
                    _sum(builder, places, (count, wides), args[5], args[6])
                    builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        whole = types.intp
        return types.void(a, b, c, whole, types.UniTuple(whole, 3), whole, types.boolean), code

    return tile


def _place(context: Any, builder: Any, kind: Any, value: Any, row: Any, column: Any) -> _Place:  # noqa: ANN401
    """Of a Matrix from that row and column on."""
    array, at, row_step, step, panel = cgutils.unpack_tuple(builder, value)
    data = make_array(kind[0])(context, builder, array).data
    width = ir.Constant(column.type, PANEL)
    for offset in (
        builder.mul(row, row_step),
        builder.mul(builder.sdiv(column, width), panel),
        builder.mul(builder.srem(column, width), step),
    ):
        at = builder.add(at, offset)
    return _Place(builder.gep(data, [at]), row_step, step)


def _sum(builder: Any, places: tuple[_Place, ...], shape: tuple[int, int], depth: Any, added: Any) -> None:  # noqa: ANN401
    """Code of a tile of so many rows and vectors of columns."""
    a, b, c = places
    rows, wides = shape
    kind = ir.VectorType(ir.FloatType(), WIDE)

    def vectors(first: Any, step: Any, row: Any) -> list[Any]:  # noqa: ANN401
        """Addresses of a row's."""
        start = builder.gep(first, [builder.mul(step, row)])
        return [vector_of(builder, builder.gep(start, [row.type(WIDE * j)]), WIDE) for j in range(wides)]

    zero = ir.Constant(kind, [0.0] * WIDE)
    sums = [[cgutils.alloca_once_value(builder, zero) for _ in range(wides)] for _ in range(rows)]
    with cgutils.for_range(builder, depth) as loop:
        factors = [builder.load(address, align=4) for address in vectors(b.first, b.row, loop.index)]
        along = builder.gep(a.first, [builder.mul(a.step, loop.index)])
        for r in range(rows):
            number = builder.load(builder.gep(along, [builder.mul(a.row, depth.type(r))]))
            factor = splat_of(builder, number, WIDE)
            for j in range(wides):
                builder.store(sum_of_product(builder, factor, factors[j], builder.load(sums[r][j])), sums[r][j])
    for r in range(rows):
        for j, address in enumerate(vectors(c.first, c.row, depth.type(r))):
            before = builder.select(added, builder.load(address, align=4), zero)
            builder.store(builder.fadd(builder.load(sums[r][j]), before), address, align=4)


_tile, _narrow_tile = _tiles(TILE), _tiles(WIDE)
