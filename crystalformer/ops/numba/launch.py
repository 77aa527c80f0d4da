"""One layer's attention by the kernels: memory and arrays for the compiled passes. No autograd here.

Legend of shapes: operands.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crystalformer.ops.numba import operands, passes
from crystalformer.ops.numba.pairs import Floats, PairPlan
from crystalformer.ops.numba.simd import LANES, WIDE
from crystalformer.ops.numba.threads import team

PART = 32
"""Atoms whose gradients of W are summed together; more where a batch would have over MOST_PARTS."""

MOST_PARTS = 128

FEATURE_LIMIT = 2**23
"""Radial features (numbers) kept for all layers; in larger batches they are computed again, atom by atom, as it takes
no longer than to read them."""

REACH = 7.0
"""Widths of a Gaussian b(d) to each side of the distance that the kernels look at, at least but for half a spacing:
exp(-6.5²/2) = 7e-10."""

_FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
"""What the kernels write, whatever the program's default dtype and device are."""

_NOTHING = np.empty(0, np.float32)

Pass = Callable[..., None]
"""passes.forward_pass or backward_pass."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """The attention of one layer over a batch.

    plan: the batch's. shape: N, H, D. basis: K, r_max and width of the radial features (Å), or nothing.
    cutoff_sigmas: where an atom's sum ends, in widths of its widest Gaussian.
    """

    plan: PairPlan
    shape: tuple[int, int, int]
    basis: tuple[float, ...]
    cutoff_sigmas: float

    def forward(self, qkv: Sequence[Tensor], c: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """y (N, H, D), and what the backward needs in one piece.

        q, k, v (N, H, D); c (N, H) in 1/Å²; weight (H or 1, D, K) or None; all of them contiguous.
        """
        make = torch.empty if self.shape[1] % LANES == 0 else torch.zeros
        memory, y = make(sum(self.sizes().lengths), **_FLOATS), torch.empty(self.shape, **_FLOATS)
        self._run(passes.forward_pass, [*qkv, c, y], weight, memory)
        return y, memory

    def backward(
        self, dy: Tensor, memory: Tensor, weight_heads: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v (N, H, D), c (N, H) and weight (weight_heads, D, K).

        dy (N, H, D), contiguous; memory: what the forward kept; weight_heads: of the weight, 0 for none.
        """
        n, heads, features = self.shape
        dq, dk, dv = (torch.empty(self.shape, **_FLOATS) for _ in range(3))
        dc = torch.empty(n, heads, **_FLOATS)
        dweight = torch.empty(heads, features, int(self.basis[0]), **_FLOATS) if weight_heads else None
        self._run(passes.backward_pass, [dq, dk, dv, dc, dy], dweight, memory)
        if dweight is None:
            return dq, dk, dv, dc, torch.empty(0, features, 0, **_FLOATS)
        return dq, dk, dv, dc, dweight if weight_heads == heads else dweight.sum(0, keepdim=True)

    def _run(self, work: Pass, operator: Sequence[Tensor], weight: Tensor | None, memory: Tensor) -> None:
        """Call a compiled pass; ``operator``: the tensors of operands.Outer from q to y."""
        sizes, plan, count = self.sizes(), self.plan, int(self.basis[0]) if self.basis else 0
        step = 0 if weight is None or len(weight) == 1 else sizes.features * count
        numbers = *map(numbers_of, operator), _NOTHING if weight is None else numbers_of(weight)
        outer = operands.Outer(self.shape[1], count, step, *numbers)
        work(plan.arrays, outer, sizes, self.features(), team(), float(self.cutoff_sigmas), memory.numpy())

    def sizes(self) -> operands.Sizes:
        """Of this layer's arrays."""
        return sizes_of(*self.shape, self.basis)

    def features(self) -> operands.Features:
        """The radial features of the plan, made as they are wanted; none to keep in a large batch."""
        plan, shells, sizes = self.plan, len(self.plan.arrays.distance), self.sizes()
        if shells * sizes.window > FEATURE_LIMIT:
            return operands.Features(_NOTHING, np.empty(0, np.int32), np.empty(0, np.int64))
        key = sizes.bases, sizes.spacing, sizes.width
        if key not in plan.features:
            b, begin = np.empty(shells * sizes.window, np.float32), np.empty(shells, np.int32)
            plan.features[key] = b, begin, np.zeros(self.shape[0], np.int64)
        return operands.Features(*plan.features[key])


@lru_cache
def sizes_of(atoms: int, heads: int, features: int, basis: tuple[float, ...]) -> operands.Sizes:
    """Of the arrays for N atoms, H heads of D features; basis as Kernels'."""
    lengths = lengths_of((atoms, heads, features), int(basis[0]) if basis else 0)
    groups, part = -(-heads // LANES), max(PART, -(-atoms // MOST_PARTS))
    scale = np.float32(1.0 / math.sqrt(features))
    if not basis:
        return operands.Sizes(groups, atoms, features, 0, 0, 1.0, 1.0, scale, part, lengths)
    count, spacing, width = int(basis[0]), basis[1] / basis[0], basis[2]
    bases = _whole(count, WIDE)
    window = _whole(math.ceil(2.0 * REACH * width / spacing) + 2, WIDE)  # as it begins at an even one
    return operands.Sizes(groups, atoms, features, bases, min(window, bases), spacing, width, scale, part, lengths)


def lengths_of(shape: Sequence[int], bases: int) -> tuple[int, ...]:
    """Numbers in each array of Kept, in whole lines of the cache, for operands of a shape (N, H, D) and K bases."""
    n, heads, features = shape
    lanes, filled = _whole(heads, LANES), _whole(bases, WIDE)
    rows, single = _whole(lanes * n * features, WIDE), _whole(lanes * n, WIDE)
    return rows, rows, rows, single, lanes * features * filled, rows, single, lanes * n * filled


def numbers_of(values: Tensor) -> Floats:
    """The numbers of a contiguous tensor, in its memory."""
    numbers: Floats = values.detach().view(-1).numpy()
    return numbers


def _whole(count: int, size: int) -> int:
    """To whole vectors of a size."""
    return -(-count // size) * size
