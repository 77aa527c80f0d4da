"""Real-space periodic attention in plain PyTorch, block by block (blocks.py); forward and hand-written backward.

The radial projection W is linear, so the radial features are summed with the softmax weights first, one
(H x M)(M x K) product an atom, and W is applied once an atom. The forward keeps the log-sum-exp (N, H) and those sums
(N, H, K); nothing with a dimension of pairs or images outlives a block.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crystalformer.ops import reciprocal
from crystalformer.ops.blocks import Block, BlockPlan
from crystalformer.ops.radial import RadialBasis, lowest_exponent


class BlockAttention(torch.autograd.Function):
    """y (N, H, D) of scaled queries, keys, values (N, H, D), precisions (N, H) in 1/Å²; atoms in the plan's order."""

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
        rows = _rows_needed(plan, precision, cutoff_sigmas)
        y = torch.empty_like(v)
        lse = torch.empty_like(precision)
        sums = None if radial is None else v.new_empty(*precision.shape, radial.count)
        for block, m in zip(plan.blocks, rows, strict=True):
            atoms = slice(block.start, block.start + block.queries)
            logits = _logits(plan, block, m, q, k, precision)
            top = logits.amax(1, keepdim=True)
            p = _weights(logits.sub_(top))
            total = p.sum(1, keepdim=True)
            lse[atoms] = (top + total.log()).squeeze(1)
            p.div_(total)
            y[atoms] = _sum_over_keys(_pair_sums(plan, block, m, p), block, v)
            if sums is not None and radial is not None:
                torch.bmm(p.transpose(1, 2), plan.block_features(block, m, radial), out=sums[atoms])
        if sums is not None and weight is not None:
            y += torch.einsum("nhk,hdk->nhd", sums, weight.expand(v.shape[1], -1, -1))
        ctx.save_for_backward(q, k, v, precision, weight, lse, sums, y)
        ctx.plan, ctx.radial, ctx.rows = plan, radial, rows
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context object
        q, k, v, precision, weight, lse, sums, y = ctx.saved_tensors
        plan: BlockPlan = ctx.plan
        dy = dy.contiguous()
        inner = (dy * y).sum(-1)  # (N, H): sum over images of p dp, without visiting them
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dprecision = torch.empty_like(precision)
        dsums = dweight = None
        if weight is not None:
            dweight = torch.einsum("nhd,nhk->hdk", dy, sums).sum_to_size(weight.shape)
            dsums = torch.einsum("nhd,hdk->nkh", dy, weight.expand(v.shape[1], -1, -1)).contiguous()
        for block, m in zip(plan.blocks, ctx.rows, strict=True):
            atoms = slice(block.start, block.start + block.queries)
            keys = slice(block.key_start, block.key_start + block.keys)
            p = _weights(_logits(plan, block, m, q, k, precision).sub_(lse[atoms].unsqueeze(1)))
            dp = _gather_pairs(plan, block, m, _scores(dy[atoms], v[keys]))
            if dsums is not None:
                dp.baddbmm_(plan.block_features(block, m, ctx.radial), dsums[atoms])
            dv[keys] += torch.einsum("haj,ahd->jhd", _pair_sums(plan, block, m, p), dy[atoms])
            dlogit = dp.sub_(inner[atoms].unsqueeze(1)).mul_(p)
            squared = _block_rows(plan.squared, block, m)
            torch.bmm(squared.unsqueeze(1), dlogit, out=dprecision[atoms].unsqueeze(1))
            dscore = _pair_sums(plan, block, m, dlogit)
            dq[atoms] = _sum_over_keys(dscore, block, k)
            dk[keys] += torch.einsum("haj,ahd->jhd", dscore, q[atoms])
        return dq, dk, dv, dprecision.neg_(), dweight, None, None, None


def _rows_needed(plan: BlockPlan, precision: Tensor, cutoff_sigmas: float) -> list[int]:
    """For each block the rows within cutoff_sigmas of the widest Gaussian of each of its atoms (sigma² = 1/(2c))."""
    radius = cutoff_sigmas / (2.0 * precision.detach().amin(1)).sqrt()
    needed = []
    for block in plan.blocks:
        reach = radius[block.start : block.start + block.queries, None]
        inside = torch.searchsorted(plan.block_distance(block), reach, right=True)
        needed.append(max(1, int(inside.max())))
    return needed


def _block_rows(values: Tensor, block: Block, m: int) -> Tensor:
    """(A, m) first m rows of each query atom."""
    part = values[block.offset : block.offset + block.queries * block.rows]
    return part.view(block.queries, block.rows)[:, :m]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """(A*J, H) products of every query with every key of a block."""
    scores = torch.bmm(q.transpose(0, 1), k.permute(1, 2, 0))
    return scores.permute(1, 2, 0).reshape(-1, q.shape[1])


def _gather_pairs(plan: BlockPlan, block: Block, m: int, table: Tensor) -> Tensor:
    """(A, m, H) rows of the (A*J, H) pair table for every shell."""
    pair = _block_rows(plan.pair, block, m).reshape(-1)
    return table.index_select(0, pair).view(block.queries, m, -1)


def _logits(plan: BlockPlan, block: Block, m: int, q: Tensor, k: Tensor, precision: Tensor) -> Tensor:
    """(A, m, H): q_i k_j - c_i d² + log(count), the exponent of a shell."""
    atoms = slice(block.start, block.start + block.queries)
    table = _scores(q[atoms], k[block.key_start : block.key_start + block.keys])
    logits = _gather_pairs(plan, block, m, table)
    squared = _block_rows(plan.squared, block, m).unsqueeze(-1)
    logits.addcmul_(squared, precision[atoms].unsqueeze(1), value=-1.0)
    return logits.add_(_block_rows(plan.log_count, block, m).unsqueeze(-1))


def _weights(exponent: Tensor) -> Tensor:
    """exp, in place, without denormal results."""
    return exponent.clamp_(min=lowest_exponent(exponent.dtype)).exp_()


def _pair_sums(plan: BlockPlan, block: Block, m: int, values: Tensor) -> Tensor:
    """(H, A, J): the (A, m, H) values of a pair's shells added up, in a fixed order."""
    heads = values.shape[-1]
    table = values.new_zeros(block.queries * block.keys, heads)
    table.index_add_(0, _block_rows(plan.pair, block, m).reshape(-1), values.reshape(-1, heads))
    return table.view(block.queries, block.keys, heads).permute(2, 0, 1)


def _sum_over_keys(pair_weights: Tensor, block: Block, v: Tensor) -> Tensor:
    """(A, H, D): sum over keys of (H, A, J) weights times the keys' features."""
    keys = v[block.key_start : block.key_start + block.keys]
    return torch.bmm(pair_weights, keys.transpose(0, 1)).transpose(0, 1)


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
    order = plan.order
    y = BlockAttention.apply(
        (q * (1.0 / math.sqrt(q.shape[-1])))[order],
        k[order],
        v[order],
        rho[order] / (2.0 * scale**2),
        weight,
        plan,
        radial,
        cutoff_sigmas,
    )
    return y[plan.inverse]  # type: ignore[no-any-return]  # apply is untyped


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
