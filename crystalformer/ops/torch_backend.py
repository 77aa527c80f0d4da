"""Real-space periodic attention in plain PyTorch, block by block (blocks.py); forward and hand-written backward.

The radial projection W is linear, so the radial features are summed with the softmax weights first, one
(H x M)(M x K) product an atom, and W is applied once an atom. The forward keeps the log-sum-exp (H, N) and those sums
(N, H, K); nothing with a dimension of pairs or images outlives a block. Inside, atoms are in plan order, so a block's
slices go into matrix products as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from crystalformer.config import CUTOFF_SIGMAS
from crystalformer.ops import reciprocal
from crystalformer.ops.blocks import PLANS, Block, BlockPlan
from crystalformer.ops.pairs import PairColumns, PairLookup
from crystalformer.ops.precision import own_precision
from crystalformer.ops.radial import RadialBasis, vanishing_exp_


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (N, H, D), its log-sum-exp (H, N) in plan order, and the weighted radial features (N, H, K) in plan order.

    q (scaled by 1/sqrt(D)), k, v (N, H, D); precision (N, H) in 1/Å²; weight (H or 1, D, K) or None; handle: the
    BlockPlan's; basis: K, r_max, width of the radial features, or nothing. All in one dtype.
    """
    plan, radial = PLANS.plan(handle), _radial(basis)
    with own_precision(q.device):
        q, k, v, precision = (t.index_select(0, plan.order) for t in (q, k, v, precision))
        c = precision.T.contiguous()
        y, total, lse = torch.empty_like(v), torch.empty_like(c), torch.empty_like(c)
        sums = v.new_empty(*v.shape[:2], 0 if radial is None else radial.count)
        reached = _reached(plan, c, cutoff_sigmas)
        for block, m in zip(plan.blocks, plan.rows_of_blocks(reached), strict=True):
            atoms, tables = _atoms(block), plan.tables(block, m)
            scores = _scores(plan, tables, q[atoms], _keys(k, tables))
            exponent, lse[:, atoms] = tables.exponent(scores, c[:, atoms], None, _buffer(plan, "p", scores, m))
            p = vanishing_exp_(_ended(exponent, reached[atoms], cutoff_sigmas))
            if radial is not None:
                torch.bmm(p, plan.features(block, radial, m), out=sums[atoms])
            collapsed = tables.collapse(p, _pair_buffer(plan, tables, scores))
            total[:, atoms] = collapsed.total
            torch.bmm(collapsed.pairs, _keys(v, tables), out=y[atoms].transpose(0, 1))
        y.div_(total.T.unsqueeze(-1))
        lse.add_(total.log())
        if weight is not None:
            sums.div_(total.T.unsqueeze(-1))
            y.transpose(0, 1).baddbmm_(sums.transpose(0, 1), weight.expand(v.shape[1], -1, -1).transpose(1, 2))
        return y.index_select(0, plan.inverse), lse, sums


_attention = torch.library.custom_op("crystalformer::torch_attention", _forward, mutates_args=())


@torch.library.custom_op("crystalformer::torch_attention_backward", mutates_args=())
def _attention_backward(  # noqa: PLR0913 - the operands of one equation
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    inner: Tensor,
    lse: Tensor,
    sums: Tensor,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, precision and weight; inner (N, H) is the sum over features of dy y."""
    plan, radial = PLANS.plan(handle), _radial(basis)
    with own_precision(q.device):
        dy, q, k, v = (t.index_select(0, plan.order) for t in (dy, q, k, v))
        c, inner = (t.index_select(0, plan.order).T.contiguous() for t in (precision, inner))
        dq, dk, dv, dc = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.empty_like(c)
        dsums, dweight = None, q.new_empty(0)
        if weight is not None:
            heads = dy.transpose(0, 1)
            dweight = torch.bmm(heads.transpose(1, 2), sums.transpose(0, 1)).sum_to_size(weight.shape)
            dsums = torch.bmm(heads, weight.expand(len(heads), -1, -1)).transpose(0, 1)
        reached = _reached(plan, c, cutoff_sigmas)
        for block, m in zip(plan.blocks, plan.rows_of_blocks(reached), strict=True):
            atoms, tables = _atoms(block), plan.tables(block, m)
            keys, values = _keys(k, tables), _keys(v, tables)
            scores = _scores(plan, tables, q[atoms], keys)
            exponent, _ = tables.exponent(scores, c[:, atoms], lse[:, atoms], _buffer(plan, "p", scores, m))
            p = vanishing_exp_(_ended(exponent, reached[atoms], cutoff_sigmas))
            scores = _scores(plan, tables, dy[atoms], values)
            dp = tables.spread(scores, inner[:, atoms], _buffer(plan, "dp", scores, m))
            if dsums is not None and radial is not None:
                dp.baddbmm_(dsums[atoms], plan.features(block, radial, m).transpose(1, 2))
            _add_to_keys(dv, tables, tables.collapse(p, _pair_buffer(plan, tables, scores)).pairs, dy[atoms])
            collapsed = tables.collapse(dp.mul_(p), _pair_buffer(plan, tables, scores))
            dc[:, atoms] = collapsed.squared
            torch.bmm(collapsed.pairs, keys, out=dq[atoms].transpose(0, 1))
            _add_to_keys(dk, tables, collapsed.pairs, q[atoms])
        dprecision = dc.neg_().T.contiguous()
        dq, dk, dv, dprecision = (t.index_select(0, plan.inverse) for t in (dq, dk, dv, dprecision))
        return dq, dk, dv, dprecision, dweight


@_attention.register_fake
def _attention_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor, Tensor]:
    n, heads, _ = v.shape
    width = int(basis[0]) if basis else 0
    return v.new_empty(v.shape), precision.new_empty(heads, n), v.new_empty(n, heads, width)


@_attention_backward.register_fake
def _attention_backward_shapes(  # noqa: PLR0913 - the operator's own arguments
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: Tensor,
    weight: Tensor | None,
    inner: Tensor,
    lse: Tensor,
    sums: Tensor,
    handle: Tensor,
    basis: Sequence[float],
    cutoff_sigmas: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dweight = q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    dq, dk, dv, dprecision = (t.new_empty(t.shape) for t in (q, k, v, precision))
    return dq, dk, dv, dprecision, dweight


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401 - torch's context
    *operands, handle, ctx.basis, ctx.cutoff_sigmas = inputs
    ctx.save_for_backward(*operands, handle, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    q, k, v, precision, weight, handle, y, lse, sums = ctx.saved_tensors
    if dy is None:
        return (None,) * 8
    inner = (dy * y).sum(-1)  # the sum over images of p dp, without visiting them
    *gradients, dweight = _attention_backward(
        dy.contiguous(), q, k, v, precision, weight, inner, lse, sums, handle, ctx.basis, ctx.cutoff_sigmas
    )
    return *gradients, None if weight is None else dweight, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def _radial(basis: Sequence[float]) -> RadialBasis | None:
    return RadialBasis(count=int(basis[0]), r_max=basis[1], width=basis[2]) if basis else None


def _reached(plan: BlockPlan, c: Tensor, cutoff_sigmas: float) -> Tensor:
    """(N,) shells within cutoff_sigmas of every atom's widest Gaussian, from c (H, N): sigma² = 1/(2c)."""
    return plan.reached(cutoff_sigmas / (2.0 * c.amin(0)).sqrt())


def _ended(exponent: Tensor, reached: Tensor, cutoff_sigmas: float) -> Tensor:
    """Exponents (A, H, m), in place, without the shells that an atom has not ``reached`` (A,), its block-mates have.

    From 6 sigma on these are rounding, 1.5e-8 of the nearest, and stay: a pass over all shells is not worth it.
    """
    if cutoff_sigmas >= CUTOFF_SIGMAS:
        return exponent
    beyond = torch.arange(exponent.shape[2], device=exponent.device) >= reached[:, None]
    return exponent.masked_fill_(beyond[:, None], -math.inf)


def _atoms(block: Block) -> slice:
    return slice(block.start, block.start + block.queries)


def _keys(values: Tensor, tables: PairColumns | PairLookup) -> Tensor:
    """(H, J, D): the block's keys out of (N, H, D)."""
    if isinstance(tables.keys, slice):
        return values[tables.keys].transpose(0, 1)
    return values.index_select(0, tables.keys).transpose(0, 1)


def _add_to_keys(target: Tensor, tables: PairColumns | PairLookup, pairs: Tensor, values: Tensor) -> None:
    """Add pairs^T (H, J, A) times values (A, H, D) to the block's keys in ``target`` (N, H, D)."""
    pairs, values = pairs.transpose(1, 2), values.transpose(0, 1)
    if isinstance(tables.keys, slice):
        target[tables.keys].transpose(0, 1).baddbmm_(pairs, values)
    else:
        target.index_add_(0, tables.keys, torch.bmm(pairs, values).transpose(0, 1))


def _scores(plan: BlockPlan, tables: PairColumns | PairLookup, q: Tensor, keys: Tensor) -> Tensor:
    """(H, A, J) products of the queries (A, H, D) with the keys (H, J, D)."""
    queries, heads, _ = q.shape
    out = plan.buffer("scores", heads * queries * tables.num_keys).view(heads, queries, -1)
    return torch.bmm(q.transpose(0, 1), keys.transpose(1, 2), out=out)


def _buffer(plan: BlockPlan, name: str, scores: Tensor, rows: int) -> Tensor:
    """(A·H·rows,) numbers."""
    return plan.buffer(name, scores.shape[0] * scores.shape[1] * rows)


def _pair_buffer(plan: BlockPlan, tables: PairColumns | PairLookup, scores: Tensor) -> Tensor:
    """(H·A·(J+1)·depth,) numbers."""
    heads, queries, keys = scores.shape
    return plan.buffer("pairs", heads * queries * (keys + 1) * tables.depth)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that attention of ``dtype`` activations is computed and summed in: float32 at least."""
    return dtype if dtype == torch.float64 else torch.float32


def _as_operator() -> bool:
    """Whether anything may be differentiated or traced; torch's way to an operator imports its compiler, a second."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def attend(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    handle: Tensor,
    *,
    scale: float,
    cutoff_sigmas: float,
    radial: RadialBasis | None,
    weight: Tensor | None,
) -> Tensor:
    """Real-space attention over a BlockPlan, by its handle; shapes as in ``ops.periodic_attention``."""
    dtype = compute_dtype(q.dtype)
    y: Tensor = (_attention if _as_operator() else _forward)(
        q.to(dtype) * (1.0 / math.sqrt(q.shape[-1])),
        k.to(dtype),
        v.to(dtype),
        rho.to(dtype) / (2.0 * scale**2),
        None if weight is None else weight.to(dtype),
        handle,
        [] if radial is None else [float(radial.count), radial.r_max, radial.width],
        cutoff_sigmas,
    )[0]
    return y.to(q.dtype)


def _reciprocal_forward(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, handle: Tensor, scale: float) -> Tensor:
    """y (N, H, D) of q (scaled by 1/sqrt(D)), k, v (N, H, D) and rho (N, H); handle: the WavePlan's; scale: Å."""
    with own_precision(q.device):
        return reciprocal.forward(q, k, v, rho, reciprocal.PLANS.plan(handle), scale)


_reciprocal = torch.library.custom_op("crystalformer::torch_reciprocal", _reciprocal_forward, mutates_args=())


@torch.library.custom_op("crystalformer::torch_reciprocal_backward", mutates_args=())
def _reciprocal_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, handle: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and rho; the forward is done again chunk by chunk."""
    with own_precision(q.device):
        return reciprocal.backward(dy, q, k, v, rho, reciprocal.PLANS.plan(handle), scale)


@_reciprocal.register_fake
def _reciprocal_shape(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, handle: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


@_reciprocal_backward.register_fake
def _reciprocal_backward_shapes(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, rho: Tensor, handle: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), rho.new_empty(rho.shape)


def _save_reciprocal(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401 - torch's context
    *operands, ctx.scale = inputs
    ctx.save_for_backward(*operands)


def _differentiate_reciprocal(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
    return *_reciprocal_backward(dy.contiguous(), *ctx.saved_tensors, ctx.scale), None, None


_reciprocal.register_autograd(_differentiate_reciprocal, setup_context=_save_reciprocal)


def attend_reciprocal(q: Tensor, k: Tensor, v: Tensor, rho: Tensor, handle: Tensor, scale: float) -> Tensor:
    """Reciprocal-space attention over a WavePlan, by its handle; shapes as in ``ops.periodic_attention``."""
    dtype = compute_dtype(q.dtype)
    scaled = q.to(dtype) * (1.0 / math.sqrt(q.shape[-1]))
    attention = _reciprocal if _as_operator() else _reciprocal_forward
    y: Tensor = attention(scaled, k.to(dtype).contiguous(), v.to(dtype).contiguous(), rho.to(dtype), handle, scale)
    return y.to(q.dtype)
