"""Layouts, threads and autograd of the numba kernels: the operator ``crystalformer::numba_attention``.

Legend of shapes: operands.py. Every atom's rows are summed by one thread, and the gradient of W over parts of fixed
size, whatever the number of threads: results do not depend on torch.set_num_threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crystalformer.batch import PackedShells
from crystalformer.ops.numba import kernels, operands
from crystalformer.ops.numba import radial as radial_kernels
from crystalformer.ops.numba.lanes import from_lanes, to_lanes, weight_from_lanes, weight_to_lanes
from crystalformer.ops.numba.pairs import PLANS, Floats, PairPlan
from crystalformer.ops.numba.simd import LANES
from crystalformer.ops.numba.threads import bounds, share
from crystalformer.ops.radial import RadialBasis

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of q, k and v. Everything is computed in float32."""

PART = 32
"""Atoms whose gradients of W are summed together; more where a batch would have over MOST_PARTS."""

MOST_PARTS = 128

FEATURE_LIMIT = 2**23
"""Radial features (numbers) kept for all layers; in larger batches they are computed again, atom by atom, as it takes
no longer than to read them."""

REACH = 7.0
"""Widths of a Gaussian b(d) to each side of the distance that the kernels look at, at least but for half a spacing:
exp(-6.5²/2) = 7e-10."""


def refusal(device: torch.device, dtype: torch.dtype, *_: int) -> str | None:
    """Why the kernels do not take operands like these, or None where they do; all sizes will do."""
    if device.type != "cpu":
        return f"numba backend: needs tensors on the CPU, got {device}"
    if dtype not in DTYPES:
        return f"numba backend: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}"
    return None


def plan(shells: PackedShells) -> Tensor:
    """Handle of the plan of a batch's shells, made once."""
    if "pairs" not in shells.cache:
        shells.cache["pairs"] = PLANS.give(PairPlan.of(shells))
    handle: Tensor = shells.cache["pairs"]
    return handle


def attend(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    shells: PackedShells,
    *,
    scale: float,
    cutoff_sigmas: float,
    radial: RadialBasis | None,
    weight: Tensor | None,
) -> Tensor:
    """Real-space attention (N, H, D); operands as in ``ops.periodic_attention``, ``shells`` within every reach.

    Raises ValueError for operands that are not on the CPU or in float64.
    """
    reason = refusal(q.device, q.dtype)
    if reason is not None:
        raise ValueError(reason)
    # Under torch.compile as the registered operator; its wrappers take longer than a small crystal's attention.
    attention = _attention if torch.compiler.is_compiling() else _Eager.apply
    y: Tensor = attention(
        q.float(),
        k.float(),
        v.float(),
        rho.float() / (2.0 * scale**2),
        None if weight is None else weight.float(),
        plan(shells),
        [] if radial is None else [float(radial.count), radial.r_max, radial.width],
        cutoff_sigmas,
    )[0]
    return y.to(q.dtype)


def _forward(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor]:
    """y (N, H, D), and what the backward needs (operands.Kept) in one piece.

    q, k, v (N, H, D); precision (N, H) in 1/Å²; weight (H or 1, D, K) or None; handle: the PairPlan's; basis: K,
    r_max, width of the radial features, or nothing.
    """
    n, heads, features = q.shape
    sizes, pairs_of = _sizes(n, heads, features, basis), PLANS.plan(handle)
    make = q.new_empty if heads % LANES == 0 else q.new_zeros
    memory = make(sum(_lengths(sizes)))
    kept = _kept(memory, sizes)
    for values, out in ((q, kept.q), (k, kept.k), (v, kept.v)):
        to_lanes(_flat(values), pairs_of.order, heads, features, out)
    to_lanes(_flat(precision), pairs_of.order, heads, 1, kept.c)
    if weight is not None:
        step = 0 if len(weight) == 1 else features * weight.shape[2]
        weight_to_lanes(_flat(weight), step, heads, features, weight.shape[2], sizes.bases, kept.weight)
    rows, radial = _rows(pairs_of, kept.c, heads, cutoff_sigmas), _features(pairs_of, sizes)
    share(lambda first, last: kernels.forward(rows, sizes, radial(), first, last, kept), bounds(rows.used))
    return _from_lanes(kept.y, pairs_of, q), memory


_attention = torch.library.custom_op("crystalformer::numba_attention", _forward, mutates_args=())


def _backward(
    dy: Tensor, memory: Tensor, handle: Tensor, basis: Sequence[float], cutoff_sigmas: float, weight_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (N, H, D), precision (N, H), weight (weight_heads, D, K), from what the forward kept."""
    n, heads, features = dy.shape
    sizes, pairs_of = _sizes(n, heads, features, basis), PLANS.plan(handle)
    kept = _kept(memory, sizes)
    rows, radial = _rows(pairs_of, kept.c, heads, cutoff_sigmas), _features(pairs_of, sizes)
    row, pairs = len(kept.q), int(rows.offset[-1])
    lengths = *(row,) * 4, len(kept.c), 2 * sizes.groups * pairs * LANES
    grads = operands.Gradients(*(np.empty(length, np.float32) for length in lengths))
    by_key = operands.ByKey(np.zeros(n + 1, np.int64), np.empty(pairs, np.int32), np.empty(pairs, np.int32))
    operands.sort_by_key(rows, by_key)
    to_lanes(_flat(dy), pairs_of.order, heads, features, grads.dy)
    part = max(PART, -(-n // MOST_PARTS))
    parts = -(-n // part) if weight_heads else 0
    dweight = np.empty(parts * len(kept.weight), np.float32)

    def by_query(first: int, last: int) -> None:
        kernels.backward_queries(rows, sizes, radial(), first, last, kept, grads)
        if parts:
            radial_kernels.backward_weight(sizes, first, last, grads.dy, kept.sums, dweight, part)

    cuts = bounds(rows.used, part)
    share(by_query, cuts)
    share(lambda first, last: kernels.backward_keys(by_key, rows, sizes, first, last, kept, grads), cuts)
    dq, dk, dv = (_from_lanes(d, pairs_of, dy) for d in (grads.dq, grads.dk, grads.dv))
    dprecision = _from_lanes(grads.dc, pairs_of, dy.new_empty(n, heads, 1)).squeeze(-1)
    count = int(basis[0]) if weight_heads else 0
    gradient = dy.new_empty(heads if parts else 0, features, count)
    if parts:
        weight_from_lanes(dweight, parts, heads, features, count, sizes.bases, _flat(gradient))
    return dq, dk, dv, dprecision, gradient if weight_heads in (0, heads) else gradient.sum(0, keepdim=True)


_attention_backward = torch.library.custom_op("crystalformer::numba_attention_backward", _backward, mutates_args=())


@_attention.register_fake
def _attention_shapes(  # noqa: PLR0913 - the operator's own arguments
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor]:
    n, heads, features = q.shape
    return q.new_empty(q.shape), q.new_empty(sum(_lengths(_sizes(n, heads, features, basis))))


@_attention_backward.register_fake
def _attention_backward_shapes(
    dy: Tensor, memory: Tensor, handle: Tensor, basis: Sequence[float], cutoff_sigmas: float, weight_heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, heads, features = dy.shape
    dq, dk, dv = (dy.new_empty(dy.shape) for _ in range(3))
    bases = int(basis[0]) if weight_heads else 0
    return dq, dk, dv, dy.new_empty(n, heads), dy.new_empty(weight_heads, features, bases)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ANN401 - torch's context
    weight, handle, ctx.basis, ctx.cutoff_sigmas = inputs[4:]
    ctx.weight_heads = 0 if weight is None else len(weight)
    ctx.save_for_backward(output[1], handle)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    return _gradients(ctx, dy, _attention_backward)


def _gradients(ctx: Any, dy: Tensor | None, backward: Callable[..., Any]) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    """Gradients of the operator's operands, by its registered backward or the function behind it."""
    if dy is None:
        return (None,) * 8
    settings = ctx.basis, ctx.cutoff_sigmas, ctx.weight_heads
    *gradients, dweight = backward(dy.contiguous(), *ctx.saved_tensors, *settings)
    return *gradients, dweight if ctx.weight_heads else None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator outside torch.compile."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - the operator's
        """As the operator's."""
        return _forward(*inputs)

    setup_context = staticmethod(_save)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """As the operator's."""
        return _gradients(ctx, dy, _backward)


def _lengths(sizes: operands.Sizes) -> tuple[int, ...]:
    """Numbers in each array of Kept."""
    atoms = sizes.groups * sizes.atoms * LANES
    rows, weight = atoms * sizes.features, sizes.groups * sizes.bases * sizes.features * LANES
    return rows, rows, rows, atoms, weight, rows, atoms, atoms * sizes.bases


def _kept(memory: Tensor, sizes: operands.Sizes) -> operands.Kept:
    """The arrays in a tensor of as many numbers."""
    lengths = _lengths(sizes)
    ends, numbers = accumulate(lengths), memory.numpy()
    return operands.Kept(*(numbers[end - length : end] for end, length in zip(ends, lengths, strict=True)))


def _flat(values: Tensor) -> Floats:
    """The numbers of a tensor, in its memory where it is contiguous."""
    numbers: Floats = values.detach().contiguous().view(-1).numpy()
    return numbers


def _from_lanes(values: Floats, plan: PairPlan, like: Tensor) -> Tensor:
    """(N, H, F), the shape of ``like``, from (G, N, F, 8)."""
    out = torch.empty(like.shape, dtype=like.dtype)
    from_lanes(values, plan.order, like.shape[1], like.shape[2], out.view(-1).numpy())
    return out


def _sizes(atoms: int, heads: int, features: int, basis: Sequence[float]) -> operands.Sizes:
    groups = -(-heads // LANES)
    scale = np.float32(1.0 / math.sqrt(features))
    if not basis:
        return operands.Sizes(groups, atoms, features, 0, 0, 1.0, 1.0, scale)
    count, spacing, width = int(basis[0]), basis[1] / basis[0], basis[2]
    window = _round_up(math.ceil(2.0 * REACH * width / spacing) + LANES)  # as it begins at a multiple of eight
    bases = _round_up(count)
    return operands.Sizes(groups, atoms, features, bases, min(window, bases), spacing, width, scale)


def _round_up(count: int) -> int:
    """To whole vectors."""
    return -(-count // LANES) * LANES


def _rows(plan: PairPlan, c: Floats, heads: int, cutoff_sigmas: float) -> operands.Rows:
    """The plan's arrays as far as the atoms' Gaussians reach."""
    n = len(plan.order)
    shells = plan.start, plan.stop, plan.distance, plan.farness, plan.images, plan.pair
    pairs = plan.pair_ptr, plan.key, plan.nearest
    rows = operands.Rows(*shells, *pairs, np.empty(n, np.int64), np.empty(n + 1, np.int64))
    operands.reach(rows, c, heads, cutoff_sigmas)
    return rows


def _features(plan: PairPlan, sizes: operands.Sizes) -> Callable[[], operands.Features]:
    """What gives a thread the radial features to use: those kept with the plan, or its own memory to make them in."""
    shells = len(plan.distance)
    if shells * sizes.window > FEATURE_LIMIT:
        most = int((plan.stop - plan.start).max())
        return lambda: operands.Features(
            np.empty(most * sizes.window, np.float32), np.empty(most, np.int32), np.empty(0, np.int64)
        )
    key = sizes.bases, sizes.spacing, sizes.width
    if key not in plan.features:
        b, begin = np.empty(shells * sizes.window, np.float32), np.empty(shells, np.int32)
        plan.features[key] = b, begin, np.zeros(len(plan.order), np.int64)
    kept = operands.Features(*plan.features[key])
    return lambda: kept
