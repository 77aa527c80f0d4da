"""A whole encoder block (model.md, section 3) in float32 on a CPU as one node of autograd.

What crystalformer.layers.EncoderBlock makes of its parts, in a third of the operations: for batches of some hundred
atoms PyTorch's own time for each of them is a third of a training step. q, k and v are one matrix product, residuals
begin the products that are added to them, and Gaussian widths are made among the attention's lanes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crystalformer.batch import PackedShells
from crystalformer.ops.numba.custom_op import plan
from crystalformer.ops.numba.launch import Kernels
from crystalformer.ops.numba.operands import Rho
from crystalformer.ops.numba.pairs import PLANS


@dataclass(frozen=True, slots=True)
class BlockSettings:
    """heads: H. basis: K, r_max, width of the radial features (Å), or nothing. cutoff_sigmas: as everywhere."""

    heads: int
    basis: tuple[float, ...]
    cutoff_sigmas: float
    rho: Rho


class Weights(NamedTuple):
    """The block's parameters; F = ff_dim, and the biases as long as their matrices.

    q, k, v, out (HD, HD); first (F, HD) and second (HD, F) of the feed-forward part; omega (H, D); radial
    (H or 1, D, K) or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    q_bias: Tensor
    k_bias: Tensor
    v_bias: Tensor
    omega: Tensor
    radial: Tensor | None
    out: Tensor
    out_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor


def encoder_block(x: Tensor, shells: PackedShells, weights: Weights, settings: BlockSettings) -> Tensor:
    """(N, HD) from x (N, HD), float32 on the CPU; ``shells`` within every reach."""
    result: Tensor = _Block.apply(x, plan(shells), settings, *weights)
    return result


class _Block(torch.autograd.Function):
    """encoder_block with the handle of the shells' plan."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, handle: Tensor, settings: BlockSettings, *given: Any) -> Tensor:  # noqa: ANN401
        """As encoder_block; ``given``: Weights."""
        weights = Weights(*given)
        projection = torch.cat((weights.q, weights.k, weights.v))
        bias = torch.cat((weights.q_bias, weights.k_bias, weights.v_bias))
        qkv = torch.addmm(bias, x, projection.t()).chunk(3, 1)
        y, memory = _kernels(x, handle, settings).forward(qkv, weights.radial, None, weights.omega)
        attended = torch.addmm(x, y, weights.out.t()).add_(weights.out_bias)
        hidden = torch.addmm(weights.first_bias, attended, weights.first.t()).relu_()
        ctx.settings, ctx.weight_heads = settings, 0 if weights.radial is None else len(weights.radial)
        matrices = projection, weights.out, weights.first, weights.second
        ctx.save_for_backward(x, y, attended, hidden, memory, handle, *matrices)
        return torch.addmm(attended, hidden, weights.second.t()).add_(weights.second_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Of x and the weights; the names are those of the forward with a d before them."""
        x, y, attended, hidden, memory, handle, projection, out, first, second = ctx.saved_tensors
        d_hidden = torch.mm(d, second)
        torch.ops.aten.threshold_backward.grad_input(d_hidden, hidden, 0, grad_input=d_hidden)
        d_attended = torch.addmm(d, d_hidden, first)
        d_qkv, kernels = x.new_empty(len(x), len(projection)), _kernels(x, handle, ctx.settings)
        d_radial, d_omega = kernels.backward(torch.mm(d_attended, out), memory, d_qkv.chunk(3, 1), ctx.weight_heads)
        (q, k, v), (q_bias, k_bias, v_bias) = torch.mm(d_qkv.t(), x).chunk(3), d_qkv.sum(0).chunk(3)
        gradients = Weights(
            q=q,
            k=k,
            v=v,
            q_bias=q_bias,
            k_bias=k_bias,
            v_bias=v_bias,
            omega=d_omega,
            radial=d_radial if ctx.weight_heads else None,
            out=torch.mm(d_attended.t(), y),
            out_bias=d_attended.sum(0),
            first=torch.mm(d_hidden.t(), attended),
            first_bias=d_hidden.sum(0),
            second=torch.mm(d.t(), hidden),
            second_bias=d.sum(0),
        )
        return torch.addmm(d_attended, d_qkv, projection), None, None, *gradients


def _kernels(x: Tensor, handle: Tensor, settings: BlockSettings) -> Kernels:
    shape = len(x), settings.heads, x.shape[1] // settings.heads
    return Kernels(PLANS.plan(handle), shape, settings.basis, settings.cutoff_sigmas, settings.rho)
