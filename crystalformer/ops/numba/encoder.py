"""An encoder's blocks in turn, there and back, in two calls of compiled code. No autograd here. Legend: block.py.

Arrays of all blocks are handed over by their addresses: to look at some hundred arrays as Python's takes longer than
a small block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic
from torch import Tensor

from crystalformer.ops.numba.block import Block, Constants, Parameters, forward_block, packed_length
from crystalformer.ops.numba.block_gradient import Flow, backward_block
from crystalformer.ops.numba.launch import FLOATS, Kernels, numbers_of
from crystalformer.ops.numba.operands import Features, Sizes, Team, kept_in
from crystalformer.ops.numba.pairs import FloatArray, Floats, IntArray, Plan
from crystalformer.ops.numba.passes import gradients_of
from crystalformer.ops.numba.rho import FUNCTIONS, Rho
from crystalformer.ops.numba.simd import LANES, WIDE, Typed, compiled, either
from crystalformer.ops.numba.threads import team

F = np.float32

WEIGHTS = len(Parameters._fields)
"""Of a block."""


def fits(features: int, hidden: int) -> bool:
    """Whether the passes take blocks of F features and M hidden ones."""
    return features % WIDE == 0 and hidden % WIDE == 0


class Common(NamedTuple):
    """What all blocks share: H, F, M, K and heads of the radial weight (H, 1, or 0 for none), sizes but for the
    Gaussians' spacing and width, rho; numbers of the radial features kept of all shells.
    """

    heads: int
    features: int
    hidden: int
    bases: int
    weight_heads: int
    sizes: Sizes
    rho: Rho
    kept: int


class Tables(NamedTuple):
    """What differs. weights, gradients (L, 14) and features (L, 3): addresses of block.Parameters' and Features' arrays.

    numbers (L, 6): spacing and width of the Gaussians in Å, and block.Constants.
    """

    weights: IntArray
    gradients: IntArray
    features: IntArray
    numbers: FloatArray


@intrinsic
def _pointer(typing: Any, address: Any) -> Typed:  # noqa: ANN401
    """An address as a pointer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ANN401
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.intp), code


@compiled
def _floats(address: int, count: int) -> Floats:
    """So many float32 from there on."""
    found: Floats = carray(_pointer(address), (count,), F)
    return found


@compiled
def _parameters(addresses: IntArray, common: Common) -> Parameters:
    """Of one block, from a row of a table."""
    f, m = common.features, common.hidden
    square, wide = f * f, f * m
    radial = common.weight_heads * common.sizes.features * common.bases
    return Parameters(
        _floats(addresses[0], square),
        _floats(addresses[1], f),
        _floats(addresses[2], square),
        _floats(addresses[3], f),
        _floats(addresses[4], square),
        _floats(addresses[5], f),
        _floats(addresses[6], square),
        _floats(addresses[7], f),
        _floats(addresses[8], wide),
        _floats(addresses[9], m),
        _floats(addresses[10], wide),
        _floats(addresses[11], f),
        _floats(addresses[12], f),
        _floats(addresses[13], radial),
    )


@compiled
def _block(layer: int, common: Common, tables: Tables, x: Floats, x2: Floats, memory: Floats) -> Block:
    """One block, whose own arrays lie in the memory."""
    spacing, width, scale, shift, precision, cutoff_sigmas = tables.numbers[layer]
    g, n, d, bases, window, _, _, dot, part, lengths = common.sizes
    sizes = Sizes(g, n, d, bases, window, spacing, width, dot, part, lengths)
    b, begin, made = tables.features[layer]
    radial = Features(
        _floats(b, common.kept * window),
        carray(_pointer(begin), (common.kept,), np.int32),
        carray(_pointer(made), (n if common.kept else 0,), np.int64),
    )
    row, attention = n * common.features, 0
    for length in lengths:
        attention += length
    lanes = g * n * LANES
    y, x1, inner = attention, attention + row, attention + 2 * row
    argument = inner + n * common.hidden
    return Block(
        common.heads,
        common.features,
        common.hidden,
        common.bases,
        d * common.bases if common.weight_heads > 1 else 0,
        sizes,
        _parameters(tables.weights[layer], common),
        Constants(scale, shift, precision, cutoff_sigmas),
        common.rho,
        radial,
        kept_in(memory, sizes),
        x,
        x2,
        memory[y : y + row],
        memory[x1 : x1 + row],
        memory[inner:argument],
        memory[argument : argument + lanes],
        memory[argument + lanes : argument + 2 * lanes],
    )


@either
def _memory_length(common: Common) -> int:
    """Numbers in one block's memory, and its features behind it."""
    s = common.sizes
    lanes = s.groups * s.atoms * LANES
    attention = 0
    for length in s.lengths:
        attention += length
    return attention + s.atoms * (3 * common.features + common.hidden) + 2 * lanes


@compiled
def _forward(
    plan: Plan, common: Common, tables: Tables, team: Team, x: Floats, memory: Floats, packs: Floats, out: Floats
) -> None:
    """Fill the features behind the blocks, out (N, F), and the memory, of all blocks or of one for all in turn."""
    layers = len(tables.weights)
    length = _memory_length(common)
    step = length if len(memory) > length else 0
    given = x
    for layer in range(layers):
        own = memory[layer * step : layer * step + length]
        behind = out if layer == layers - 1 else own[length - len(x) :]
        forward_block(_block(layer, common, tables, given, behind, own), plan, packs, team)
        given = behind


@compiled
def _backward(
    plan: Plan, common: Common, tables: Tables, team: Team, x: Floats, memory: Floats, dx2: Floats, dx: Floats
) -> None:
    """Fill the gradients of the features before the blocks, dx (N, F), and those that the tables name."""
    length, row, sizes = _memory_length(common), len(x), common.sizes
    inner, dx1 = np.empty(sizes.atoms * common.hidden, F), np.empty(row, F)
    dq, dk, dv = np.empty(row, F), np.empty(row, F), np.empty(row, F)
    first, second = np.empty(row, F), np.empty(row, F)
    attention = gradients_of(common.weight_heads > 0, sizes, plan.pair_ptr[-1])
    given = dx2
    for layer in range(len(tables.weights) - 1, -1, -1):
        own = memory[layer * length : (layer + 1) * length]
        before = x if layer == 0 else memory[layer * length - row : layer * length]
        block = _block(layer, common, tables, before, before, own)
        into = dx if layer == 0 else first if layer % 2 else second
        flow = Flow(given, inner, dx1, dq, dk, dv, into, attention)
        backward_block(block, plan, flow, _parameters(tables.gradients[layer], common), team)
        given = into


@dataclass(frozen=True, slots=True)
class Constant:
    """Of a block: its attention's kernels, and block.Constants but the cutoff."""

    attention: Kernels
    scale: float
    shift: float
    precision: float


class Encoder:
    """Blocks in turn over a batch whose atoms are in the order of its plan.

    blocks: one for each. hidden: M. function, beta and lower: of rho. Weights are the tensors of block.Parameters of
    each block in turn, float32 on the CPU; None for those that it does not have.
    """

    def __init__(self, blocks: Sequence[Constant], hidden: int, rho: tuple[str, float, float]) -> None:
        self._blocks, self._hidden = blocks, hidden
        self._rho = Rho(FUNCTIONS.index(rho[0]), *rho[1:])
        self._plan = blocks[0].attention.plan.placed

    def forward(self, x: Tensor, weights: Sequence[Tensor | None], *, keep: bool) -> tuple[Tensor, Tensor]:
        """Features behind the blocks (N, F), from those before them, and the memory that ``backward`` takes.

        keep: whether there will be one.
        """
        common, tables = self._common(weights[WEIGHTS - 1]), self._tables(weights, ())
        length, heads = _memory_length(common), common.heads
        make = torch.empty if heads % LANES == 0 else torch.zeros
        memory, out = make(length * (len(self._blocks) if keep else 1), **FLOATS), torch.empty_like(x)
        packs = np.empty(packed_length(common.features, self._hidden), F)
        _forward(
            self._plan, common, tables, team(), numbers_of(x), numbers_of(memory), packs, numbers_of(out)
        )
        return out, memory

    def backward(
        self, dx2: Tensor, x: Tensor, memory: Tensor, weights: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the features before the blocks (N, F), and of the weights, from that of those behind them."""
        gradients = _like(weights)
        common, tables, dx = self._common(weights[WEIGHTS - 1]), self._tables(weights, gradients), torch.empty_like(x)
        arrays = map(numbers_of, (x, memory, dx2, dx))
        _backward(self._plan, common, tables, team(), *arrays)
        return dx, gradients

    def _common(self, radial: Tensor | None) -> Common:
        attention = self._blocks[0].attention
        _, heads, features = attention.shape
        weight_heads, bases = (0, 0) if radial is None else (len(radial), radial.shape[-1])
        kept = len(attention.features().begin)
        width = heads * features
        return Common(heads, width, self._hidden, bases, weight_heads, attention.sizes(), self._rho, kept)

    def _tables(self, weights: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tables:
        kernels = [block.attention for block in self._blocks]
        features = [array.ctypes.data for one in kernels for array in one.features()]
        numbers = [
            (one.sizes().spacing, one.sizes().width, block.scale, block.shift, block.precision, one.cutoff_sigmas)
            for one, block in zip(kernels, self._blocks, strict=True)
        ]
        return Tables(
            _addresses(weights), _addresses(gradients), np.array(features).reshape(-1, 3), np.array(numbers, np.float64)
        )


def _addresses(tensors: Sequence[Tensor | None]) -> IntArray:
    """(L, 14) of the blocks' tensors; RuntimeError where one is not what the passes read."""
    for t in tensors:
        if t is not None and not (t.dtype is torch.float32 and t.is_contiguous()):
            raise RuntimeError(f"the encoder's weights must be contiguous and of float32, got {t.dtype}, {t.stride()}")
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64).reshape(-1, WEIGHTS)


def _like(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Memory for as many, in one piece."""
    sizes = [0 if t is None else t.numel() for t in tensors]
    parts = torch.empty(sum(sizes), **FLOATS).split(sizes)
    return [None if t is None else part.view(t.shape) for t, part in zip(tensors, parts, strict=True)]
