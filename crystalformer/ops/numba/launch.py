"""Layouts, threads and autograd of the numba kernels: the operator ``crystalformer::numba_attention``.

Legend of shapes: kernels.py. The atoms are cut into parts of fixed size, whatever the number of threads, and only the
gradient of W is summed over parts: results do not depend on torch.set_num_threads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crystalformer.batch import PackedShells
from crystalformer.ops.numba import kernels
from crystalformer.ops.numba.pairs import PLANS, PairPlan
from crystalformer.ops.numba.simd import LANES
from crystalformer.ops.radial import RadialBasis

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of q, k and v. Everything is computed in float32."""

PART = 32
"""Atoms whose gradients of W are summed together; more where a batch would have over MOST_PARTS."""

MOST_PARTS = 128

REACH = 7.0
"""Widths of a Gaussian b(d) to each side of the distance that the kernels look at: exp(-7²/2) = 2e-11."""


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
    as_operator = torch.is_grad_enabled() or torch.compiler.is_compiling()
    y: Tensor = (_attention if as_operator else _forward)(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (N, H, D), and for the backward: q, k, v, c, weight, y, lse, sums in the kernels' layouts; radius (N,) Å.

    q, k, v (N, H, D); precision (N, H) in 1/Å²; weight (H or 1, D, K) or None; handle: the PairPlan's; basis: K,
    r_max, width of the radial features, or nothing.
    """
    n, heads, features = q.shape
    sizes = _sizes(n, heads, features, basis)
    radius = cutoff_sigmas / (2.0 * precision.amin(1)).sqrt()
    kept = [_to_lanes(t) for t in (q * (1.0 / math.sqrt(features)), k, v, precision.unsqueeze(-1))]
    kept.append(_weight_to_lanes(weight, sizes, heads, q))
    kept += [torch.empty_like(kept[0]), torch.empty_like(kept[3]), q.new_empty(sizes.groups, n, sizes.bases, LANES)]
    rows, arrays = _rows(PLANS.plan(handle), radius), [_flat(t) for t in kept]
    _share(lambda first, last: kernels.forward(rows, sizes, first, last, *arrays), rows)
    return _from_lanes(kept[5], heads), *kept, radius  # type: ignore[return-value]  # as many as are named above


_attention = torch.library.custom_op("crystalformer::numba_attention", _forward, mutates_args=())


@torch.library.custom_op("crystalformer::numba_attention_backward", mutates_args=())
def _attention_backward(  # noqa: PLR0913 - what the forward kept
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    weight: Tensor,
    y: Tensor,
    lse: Tensor,
    sums: Tensor,
    radius: Tensor,
    handle: Tensor,
    basis: Sequence[float],
    weight_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, precision (N, H) and weight (weight_heads, D, K); operands as the forward gives them."""
    n, heads, features = dy.shape
    pairs_of, sizes = PLANS.plan(handle), _sizes(n, heads, features, basis)
    rows = _rows(pairs_of, radius)
    part = max(PART, -(-n // MOST_PARTS))
    dweight = weight.new_zeros(-(-n // part), *weight.shape)
    dy, dq, dk, dv, dc = _to_lanes(dy), *(torch.empty_like(t) for t in (q, k, v, c))
    pairs = [dy.new_empty(sizes.groups * int(rows.offset[-1]) * LANES) for _ in range(2)]
    queries = [_flat(t) for t in (q, k, v, c, weight, y, lse, sums, dy, dq, dc, dweight, *pairs)]
    _share(lambda first, last: kernels.backward_queries(rows, sizes, first, last, *queries, part), rows, part)
    keys = [_flat(t) for t in (q, dy, *pairs, dk, dv)]
    by_key = pairs_of.by_key_ptr, pairs_of.by_key, pairs_of.query
    _share(lambda first, last: kernels.backward_keys(*by_key, rows, sizes, first, last, *keys), rows)
    return (
        _from_lanes(dq, heads).mul_(1.0 / math.sqrt(features)),
        _from_lanes(dk, heads),
        _from_lanes(dv, heads),
        _from_lanes(dc, heads).squeeze(-1),
        _weight_from_lanes(dweight.sum(0), heads, weight_heads, int(basis[0]) if basis else 0),
    )


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, heads, features = v.shape
    sizes = _sizes(0, int(heads), int(features), basis)
    rows = v.new_empty(sizes.groups, n, features, LANES)
    c = v.new_empty(sizes.groups, n, 1, LANES)
    w = v.new_empty(sizes.groups, sizes.bases, features, LANES)
    sums = v.new_empty(sizes.groups, n, sizes.bases, LANES)
    row, scalar = torch.empty_like, torch.empty_like
    return v.new_empty(v.shape), row(rows), row(rows), row(rows), c, w, rows, scalar(c), sums, v.new_empty(n)


@_attention_backward.register_fake
def _attention_backward_shapes(  # noqa: PLR0913 - the operator's own arguments
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    c: Tensor,
    weight: Tensor,
    y: Tensor,
    lse: Tensor,
    sums: Tensor,
    radius: Tensor,
    handle: Tensor,
    basis: Sequence[float],
    weight_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, heads, features = dy.shape
    dq, dk, dv = (dy.new_empty(dy.shape) for _ in range(3))
    return dq, dk, dv, dy.new_empty(n, heads), dy.new_empty(weight_heads, features, int(basis[0]) if basis else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401 - torch's context
    weight, handle, ctx.basis = inputs[4:7]
    ctx.weight_heads = 0 if weight is None else len(weight)
    ctx.save_for_backward(*output[1:], handle)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    if dy is None:
        return (None,) * 8
    *gradients, dweight = _attention_backward(dy, *ctx.saved_tensors, ctx.basis, ctx.weight_heads)
    return *gradients, dweight if ctx.weight_heads else None, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _sizes(atoms: int, heads: int, features: int, basis: Sequence[float]) -> kernels.Sizes:
    groups = -(-heads // LANES)
    if not basis:
        return kernels.Sizes(groups, atoms, features, 0, 0, 1.0, 1.0)
    count, spacing, width = int(basis[0]), basis[1] / basis[0], basis[2]
    window = _round_up(math.ceil(2.0 * REACH * width / spacing) + 1)
    bases = _round_up(count)
    return kernels.Sizes(groups, atoms, features, bases, min(window, bases), spacing, width)


def _round_up(count: int) -> int:
    """To whole vectors."""
    return -(-count // LANES) * LANES


def _rows(plan: PairPlan, radius: Tensor) -> kernels.Rows:
    """The plan's arrays as far as ``radius`` (N,) Å reaches."""
    used, offset = np.empty(len(radius), np.int64), np.empty(len(radius) + 1, np.int64)
    kernels.reach(plan.ptr, plan.distance, plan.pair_ptr, plan.nearest, radius.numpy(), used, offset)
    shells = plan.ptr, plan.distance, plan.count, plan.pair
    return kernels.Rows(*shells, plan.pair_ptr, plan.key, plan.nearest, used, offset)


def _to_lanes(values: Tensor) -> Tensor:
    """(G, N, F, 8), zeros for heads that are not there, from (N, H, F); always a copy."""
    n, heads, features = values.shape
    if heads % LANES:
        values = torch.nn.functional.pad(values, (0, 0, 0, -heads % LANES))
    groups = -(-heads // LANES)
    out = values.new_empty(groups, n, features, LANES)
    return out.copy_(values.reshape(n, groups, LANES, features).permute(1, 0, 3, 2))


def _from_lanes(values: Tensor, heads: int) -> Tensor:
    """(N, H, F) from (G, N, F, 8); always a copy."""
    groups, n, features, _ = values.shape
    out = values.new_empty(n, groups * LANES, features)
    out.view(n, groups, LANES, features).copy_(values.permute(1, 0, 3, 2))
    return out[:, :heads].contiguous()


def _weight_to_lanes(weight: Tensor | None, sizes: kernels.Sizes, heads: int, like: Tensor) -> Tensor:
    """(G, K, D, 8), zeros for heads and bases that are not there, from (H or 1, D, K)."""
    if weight is None:
        return like.new_empty(sizes.groups, 0, sizes.features, LANES)
    missing = sizes.bases - weight.shape[2]
    return _to_lanes(torch.nn.functional.pad(weight.expand(heads, -1, -1), (0, missing)).permute(2, 0, 1))


def _weight_from_lanes(values: Tensor, heads: int, weight_heads: int, count: int) -> Tensor:
    """(H or 1, D, count) from (G, K, D, 8), summed over the heads that share it."""
    weight = _from_lanes(values, heads)[:count].permute(1, 2, 0)
    return weight.sum(0, keepdim=True) if weight_heads == 1 else weight[:weight_heads].contiguous()


def _flat(values: Tensor) -> kernels.Floats:
    flat: kernels.Floats = values.view(-1).numpy()
    return flat


def _share(work: Callable[[int, int], None], rows: kernels.Rows, step: int = 1) -> None:
    """Call ``work(first, last)`` for all atoms, on torch's number of threads with as many shells each.

    Only multiples of ``step`` are cut at.
    """
    n, threads = len(rows.used), torch.get_num_threads()
    if threads == 1 or n < 2 * step:
        work(0, n)
        return
    work_before = np.concatenate([[0], np.cumsum(rows.used)])
    cuts = np.searchsorted(work_before, work_before[-1] * np.arange(1, threads) / threads)
    bounds = [0, *sorted({int(cut) // step * step for cut in cuts} - {0}), n]
    others = [_pool().submit(work, first, last) for first, last in zip(bounds[1:-1], bounds[2:], strict=True)]
    work(bounds[0], bounds[1])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads that wait for parts; a forked process makes its own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="crystalformer-attention")


os.register_at_fork(after_in_child=_pool.cache_clear)
