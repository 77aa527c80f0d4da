"""Real-space periodic attention in plain PyTorch, block by block (blocks.py); forward and hand-written backward.

The radial projection W is linear, so the radial features are summed with the softmax weights first, one
(H x M)(M x K) product an atom, and W is applied once an atom. The forward keeps the log-sum-exp (H, N) and those sums
(N, H, K); nothing with a dimension of pairs or images outlives a block. Inside, atoms are in plan order, so a block's
slices go into matrix products as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crystalformer.ops import reciprocal
from crystalformer.ops.blocks import Block, BlockPlan
from crystalformer.ops.pairs import PairColumns, PairLookup
from crystalformer.ops.radial import RadialBasis, lowest_exponent


class BlockAttention(torch.autograd.Function):
    """y (N, H, D) of queries (scaled by 1/sqrt(D)), keys, values (N, H, D), precisions (N, H) in 1/Å²."""

    @staticmethod
    def forward(  # noqa: PLR0913 - torch fixes the signature to one argument an input
        ctx: Any,  # noqa: ANN401 - torch's context object
        q: Tensor,
        k: Tensor,
        v: Tensor,
        precision: Tensor,
        weight: Tensor | None,
        plan: BlockPlan,
        radial: RadialBasis | None,
        cutoff_sigmas: float,
    ) -> Tensor:
        q, k, v = (t.index_select(0, plan.order) for t in (q, k, v))
        c = precision[plan.order].T.contiguous()
        y, total, lse = torch.empty_like(v), torch.empty_like(c), torch.empty_like(c)
        rows = plan.rows_needed(cutoff_sigmas / (2.0 * c.amin(0)).sqrt())
        sums = None if radial is None else v.new_empty(*precision.shape, radial.count)
        for block, m in zip(plan.blocks, rows, strict=True):
            atoms, tables = _atoms(block), plan.tables(block, m)
            scores = _scores(plan, tables, q[atoms], _keys(k, tables))
            exponent, lse[:, atoms] = tables.exponent(scores, c[:, atoms], None, _buffer(plan, "p", scores, m))
            p = _exp(exponent)
            if sums is not None and radial is not None:
                torch.bmm(p, plan.features(block, radial, m), out=sums[atoms])
            collapsed = tables.collapse(p, _pair_buffer(plan, scores))
            total[:, atoms] = collapsed.total
            torch.bmm(collapsed.pairs, _keys(v, tables), out=y[atoms].transpose(0, 1))
        y.div_(total.T.unsqueeze(-1))
        lse.add_(total.log())
        if sums is not None and weight is not None:
            sums.div_(total.T.unsqueeze(-1))
            y.transpose(0, 1).baddbmm_(sums.transpose(0, 1), weight.expand(v.shape[1], -1, -1).transpose(1, 2))
        ctx.save_for_backward(q, k, v, c, weight, lse, sums, y)
        ctx.plan, ctx.radial, ctx.rows = plan, radial, rows
        return y.index_select(0, plan.inverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context object
        q, k, v, c, weight, lse, sums, y = ctx.saved_tensors
        plan: BlockPlan = ctx.plan
        dy = dy.index_select(0, plan.order)
        inner = (dy * y).sum(-1).T.contiguous()  # (H, N): sum over images of p dp, without visiting them
        dq, dk, dv, dc = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v), torch.empty_like(c)
        dsums = dweight = None
        if weight is not None:
            heads = dy.transpose(0, 1)
            dweight = torch.bmm(heads.transpose(1, 2), sums.transpose(0, 1)).sum_to_size(weight.shape)
            dsums = torch.bmm(heads, weight.expand(len(heads), -1, -1)).transpose(0, 1)
        for block, m in zip(plan.blocks, ctx.rows, strict=True):
            atoms, tables = _atoms(block), plan.tables(block, m)
            keys, values = _keys(k, tables), _keys(v, tables)
            scores = _scores(plan, tables, q[atoms], keys)
            exponent, _ = tables.exponent(scores, c[:, atoms], lse[:, atoms], _buffer(plan, "p", scores, m))
            p = _exp(exponent)
            scores = _scores(plan, tables, dy[atoms], values)
            dp = tables.spread(scores, inner[:, atoms], _buffer(plan, "dp", scores, m))
            if dsums is not None:
                dp.baddbmm_(dsums[atoms], plan.features(block, ctx.radial, m).transpose(1, 2))
            pairs = tables.collapse(p, _pair_buffer(plan, scores)).pairs
            _add_to_keys(dv, tables, pairs, dy[atoms])
            collapsed = tables.collapse(dp.mul_(p), _pair_buffer(plan, scores))
            dc[:, atoms] = collapsed.squared
            torch.bmm(collapsed.pairs, keys, out=dq[atoms].transpose(0, 1))
            _add_to_keys(dk, tables, collapsed.pairs, q[atoms])
        dq, dk, dv = (t.index_select(0, plan.inverse) for t in (dq, dk, dv))
        return dq, dk, dv, dc.neg_().T[plan.inverse], dweight, None, None, None


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


def _pair_buffer(plan: BlockPlan, scores: Tensor) -> Tensor:
    """(H·A·(J+1),) numbers."""
    return plan.buffer("pairs", scores.shape[0] * scores.shape[1] * (scores.shape[2] + 1))


def _exp(exponent: Tensor) -> Tensor:
    """exp, in place, without denormal results."""
    return exponent.clamp_(min=lowest_exponent(exponent.dtype)).exp_()


def attend(  # noqa: PLR0913 - the operands of one equation
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rho: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    cutoff_sigmas: float,
    radial: RadialBasis | None,
    weight: Tensor | None,
) -> Tensor:
    """Real-space attention over a plan; shapes as in ``ops.periodic_attention``."""
    return BlockAttention.apply(  # type: ignore[no-any-return]  # apply is untyped
        q * (1.0 / math.sqrt(q.shape[-1])), k, v, rho / (2.0 * scale**2), weight, plan, radial, cutoff_sigmas
    )


class ReciprocalAttention(torch.autograd.Function):
    """y (N, H, D) of scaled queries, keys, values (N, H, D) and rho (N, H); nothing of a chunk is kept."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's context object
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rho: Tensor,
        plan: reciprocal.WavePlan,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, rho)
        ctx.plan, ctx.scale = plan, scale
        return reciprocal.forward(q, k, v, rho, plan, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context object
        q, k, v, rho = ctx.saved_tensors
        return *reciprocal.backward(dy, q, k, v, rho, ctx.plan, ctx.scale), None, None


def attend_reciprocal(
    q: Tensor, k: Tensor, v: Tensor, rho: Tensor, plan: reciprocal.WavePlan, scale: float
) -> Tensor:
    """Reciprocal-space attention over a plan; shapes as in ``ops.periodic_attention``."""
    scaled = q * (1.0 / math.sqrt(q.shape[-1]))
    return ReciprocalAttention.apply(scaled, k, v, rho, plan, scale)  # type: ignore[no-any-return]  # apply is untyped
