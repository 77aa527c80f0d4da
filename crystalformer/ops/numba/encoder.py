"""An encoder's blocks in turn, there and back, in two calls of compiled code. No autograd here. Legend: block.py.

Arrays of all blocks are handed over by their addresses: to look at some hundred arrays as Python's takes longer than
a small block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from crystalformer.ops.numba.block import (
    PARAMETERS,
    Block,
    Constants,
    floats_at,
    forward_block,
    packed_length,
    pointer,
)
from crystalformer.ops.numba.block_gradient import Flow, backward_block
from crystalformer.ops.numba.launch import Kernels, numbers_of
from crystalformer.ops.numba.memory import LINE, PIECES
from crystalformer.ops.numba.operands import Features, Rows, Sizes, Team, kept_in, reach
from crystalformer.ops.numba.pairs import FloatArray, Floats, IntArray, Plan, sort_by_key
from crystalformer.ops.numba.rho import FUNCTIONS, Rho
from crystalformer.ops.numba.simd import LANES, WIDE, compiled, either, inlined
from crystalformer.ops.numba.threads import team

F = np.float32


def fits(features: int, hidden: int) -> bool:
    """Whether the passes take blocks of F features and M hidden ones."""
    return features % WIDE == 0 and hidden % WIDE == 0


class Common(NamedTuple):
    """What all blocks share: H, F, M, K, heads of W (H, 1, or 0 without one), rho, and sizes but for a basis.

    kept: shells whose radial features are kept with the batch; none of a large one's.
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
    """What differs between L blocks.

    weights, gradients (L, 14) and features (L, 3): addresses of the parameters, in the order of block.py, their
    gradients, and operands.Features' arrays. numbers (L, 6): spacing and width of the basis in Å, block.Constants.
    """

    weights: IntArray
    gradients: IntArray
    features: IntArray
    numbers: FloatArray


@either
def _attention_length(sizes: Sizes) -> int:
    """Numbers that the attention keeps."""
    length = 0
    for one in sizes.lengths:
        length += one
    return length


@either
def _lanes_length(sizes: Sizes) -> int:
    """Numbers (G, N, 8), in whole lines of the cache."""
    return -(-sizes.groups * sizes.atoms * LANES // LINE) * LINE


@inlined
def _block(layer: int, common: Common, tables: Tables, x: Floats, x2: Floats, memory: Floats) -> Block:
    """One block, whose own arrays lie in the memory."""
    spacing, width, scale, shift, precision, cutoff_sigmas = tables.numbers[layer]
    g, n, d, bases, window, _, _, dot, part, lengths = common.sizes
    sizes = Sizes(g, n, d, bases, window, spacing, width, dot, part, lengths)
    b, begin, made = tables.features[layer]
    radial = Features(
        floats_at(b, common.kept * window),
        carray(pointer(begin), (common.kept,), np.int32),
        carray(pointer(made), (n if common.kept else 0,), np.int64),
    )
    row, attention, lanes = n * common.features, _attention_length(sizes), _lanes_length(sizes)
    y, x1, inner = attention, attention + row, attention + 2 * row
    argument = inner + n * common.hidden
    return Block(
        common.heads,
        common.features,
        common.hidden,
        common.bases,
        d * common.bases if common.weight_heads > 1 else 0,
        sizes,
        tables.weights[layer],
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
    sizes = common.sizes
    rows = sizes.atoms * (3 * common.features + common.hidden)
    return _attention_length(sizes) + rows + 2 * _lanes_length(sizes)


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


@either
def _scratch_length(common: Common, pairs: int) -> int:
    """Numbers that a backward needs beside its memory, for so many pairs in all."""
    s = common.sizes
    return s.atoms * (6 * common.features + common.hidden) + 2 * s.groups * pairs * LANES


@compiled
def _backward(  # noqa: PLR0913 - arrays that numba takes one by one
    plan: Plan,
    common: Common,
    tables: Tables,
    team: Team,
    x: Floats,
    memory: Floats,
    scratch: Floats,
    dx2: Floats,
    dx: Floats,
) -> None:
    """Fill the gradients of the features before the blocks, dx (N, F), and those that the tables name."""
    length, row = _memory_length(common), len(x)
    dx1, dq, dk, dv = scratch[:row], scratch[row : 2 * row], scratch[2 * row : 3 * row], scratch[3 * row : 4 * row]
    first, second, rest = scratch[4 * row : 5 * row], scratch[5 * row : 6 * row], scratch[6 * row :]
    inner, pairs = rest[: common.sizes.atoms * common.hidden], rest[common.sizes.atoms * common.hidden :]
    used, in_reach, widest = _reached(plan, common, tables, x, memory)
    by_key, given = sort_by_key(plan, widest, common.sizes.groups), dx2
    for layer in range(len(tables.weights) - 1, -1, -1):
        own = memory[layer * length : (layer + 1) * length]
        before = x if layer == 0 else memory[layer * length - row : layer * length]
        block = _block(layer, common, tables, before, before, own)
        into = dx if layer == 0 else first if layer % 2 else second
        flow = Flow(given, inner, dx1, dq, dk, dv, into, pairs)
        rows = Rows(plan, used[layer], in_reach[layer])
        backward_block(block, rows, by_key, flow, tables.gradients[layer], team)
        given = into


@compiled
def _reached(
    plan: Plan, common: Common, tables: Tables, x: Floats, memory: Floats
) -> tuple[IntArray, IntArray, IntArray]:
    """By layer the shells and the pairs of each atom that are in reach (L, N), and the most pairs (N,) in any."""
    layers, length, atoms = len(tables.weights), _memory_length(common), common.sizes.atoms
    used, pairs, widest = (
        np.empty((layers, atoms), np.int64),
        np.empty((layers, atoms), np.int64),
        np.zeros(atoms, np.int64),
    )
    for layer in range(layers):
        block = _block(layer, common, tables, x, x, memory[layer * length : (layer + 1) * length])
        rows = reach(plan, block.kept.c, common.heads, block.constants.cutoff_sigmas)
        used[layer], pairs[layer] = rows.used, rows.pairs
        widest = np.maximum(widest, rows.pairs)
    return used, pairs, widest


@dataclass(frozen=True, slots=True)
class Layer:
    """Of a block: its attention's kernels, s and t (s = 0: none yet), 1/(2 scale_real²) in 1/Å²."""

    attention: Kernels
    scale: float
    shift: float
    precision: float


class Encoder:
    """Blocks in turn over a batch whose atoms are in the order of its plan.

    layers: one for each block. hidden: M. rho: its function, beta and lower bound. ``weights`` are the parameters of
    each block in turn, in the order of block.py, contiguous float32 on the CPU; None for those that it does not have.
    """

    def __init__(self, layers: Sequence[Layer], hidden: int, rho: tuple[str, float, float]) -> None:
        kernels = [layer.attention for layer in layers]
        self._pairs, self._count = kernels[0].plan, len(layers)
        self._hidden, self._rho = hidden, Rho(FUNCTIONS.index(rho[0]), *rho[1:])
        self._shape, self._sizes = kernels[0].shape, kernels[0].sizes()
        self._features = [one.features() for one in kernels]
        places = [array.ctypes.data for features in self._features for array in features]
        self._places = np.array(places, np.int64).reshape(-1, len(Features._fields))
        sizes = [one.sizes() for one in kernels]
        numbers = [
            (size.spacing, size.width, one.scale, one.shift, one.precision, one.attention.cutoff_sigmas)
            for size, one in zip(sizes, layers, strict=True)
        ]
        self._numbers = np.array(numbers, np.float64)

    def forward(self, x: Tensor, weights: Sequence[Tensor | None], *, keep: bool) -> tuple[Tensor, Tensor]:
        """Features behind the blocks (N, F), from those before them, and the memory that ``backward`` takes.

        keep: whether there will be one.
        """
        common = self._common(weights[PARAMETERS - 1])
        memory = PIECES.take(_memory_length(common) * (self._count if keep else 1))
        if common.heads % LANES:
            memory.fill(0)
        packs, out = PIECES.take(packed_length(common.features, common.hidden)), torch.empty_like(x)
        arrays = numbers_of(x), memory, packs, numbers_of(out)
        _forward(self._pairs.placed, common, self._tables(weights, ()), team(), *arrays)
        return out, torch.from_numpy(memory)

    def backward(
        self, dx2: Tensor, x: Tensor, memory: Tensor, weights: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Gradients of the features before the blocks (N, F), and of the weights, from that of those behind them."""
        gradients, dx = [None if w is None else torch.empty_like(w) for w in weights], torch.empty_like(x)
        common, tables = self._common(weights[PARAMETERS - 1]), self._tables(weights, gradients)
        scratch = PIECES.take(_scratch_length(common, len(self._pairs.arrays.key)))
        arrays = numbers_of(x), numbers_of(memory), scratch, numbers_of(dx2), numbers_of(dx)
        _backward(self._pairs.placed, common, tables, team(), *arrays)
        return dx, gradients

    def _common(self, radial: Tensor | None) -> Common:
        """radial: the first block's."""
        _, heads, features = self._shape
        weight_heads, bases = (0, 0) if radial is None else (len(radial), radial.shape[-1])
        kept = len(self._features[0].begin)
        return Common(heads, heads * features, self._hidden, bases, weight_heads, self._sizes, self._rho, kept)

    def _tables(self, weights: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> Tables:
        return Tables(_addresses(weights), _addresses(gradients), self._places, self._numbers)


def _addresses(tensors: Sequence[Tensor | None]) -> IntArray:
    """(L, 14) of the blocks' tensors; RuntimeError where one is not what the passes read."""
    for t in tensors:
        if t is not None and not (t.dtype is torch.float32 and t.is_contiguous()):
            raise RuntimeError(
                f"the encoder's weights must be contiguous and of float32, got {t.dtype}, {t.stride()}"
            )
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.int64).reshape(-1, PARAMETERS)
