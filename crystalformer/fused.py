"""The encoder on a CPU as one node of autograd: the same products and kernels, without a graph between them.

What is computed is layers.EncoderBlock, which says so in modules. Whatever looks into these (hooks, ZeRO 3, autocast,
torch.compile, another dtype or device) gets them; in a small batch's step PyTorch's graph and its views took a tenth.

Legend: N atoms, F = model_dim = H·D, M = ff_dim; others as in batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from crystalformer.batch import CrystalBatch
from crystalformer.ops.attention import chosen_backend
from crystalformer.positive import positive, positive_slope

if TYPE_CHECKING:
    from crystalformer.config import PositiveFunction
    from crystalformer.layers import EncoderBlock
    from crystalformer.ops.numba.launch import Kernels


class Weights(NamedTuple):
    """Of a block: weights (out, in) and biases of its linear layers, omega (H, D), and W (H or 1, D, K) or None."""

    query: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    value: Tensor
    value_bias: Tensor
    out: Tensor
    out_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    direction: Tensor
    radial: Tensor | None


class Layer(NamedTuple):
    """What else a block computes with.

    kernels: its attention's. shape: N, H, D. scale and shift: s and t; s = 0 says that there are none yet.
    precision: 1/(2 scale_real²) in 1/Å². positive and lower: of rho.
    """

    kernels: Kernels
    shape: tuple[int, int, int]
    scale: float
    shift: float
    precision: float
    positive: PositiveFunction
    lower: float


class Kept(NamedTuple):
    """Of a block's forward for its backward.

    x, y, x1 (N, F): its features, what out_proj and the feed-forward network are given; hidden (N, M); q (N, H, D);
    argument and rho (N, H); memory: the kernels'.
    """

    x: Tensor
    q: Tensor
    argument: Tensor
    rho: Tensor
    memory: Tensor
    y: Tensor
    x1: Tensor
    hidden: Tensor


def applies(blocks: Sequence[EncoderBlock], x: Tensor) -> bool:
    """Whether the compiled kernels take the features x (N, F), and nobody looks at what is inside the blocks."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    attention = blocks[0].attention
    like = attention.gauss_direction
    if attention.config.domain != "real" or like.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if hasattr(like, "ds_id"):  # ZeRO 3 gathers weights where modules are called
        return False
    if any(_is_watched(module) for block in blocks for module in block.inside):
        return False
    return chosen_backend(attention.backend, "real", like, attention.radial) == "numba"


def _is_watched(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks)


def encode(blocks: Sequence[EncoderBlock], x: Tensor, batch: CrystalBatch) -> Tensor:
    """Features (N, F) after the blocks, from those before them, where this ``applies``."""
    layers = [_layer(block, len(x), batch) for block in blocks]
    weights = [weight for block in blocks for weight in _weights(block)]
    if torch.is_grad_enabled():
        encoded: Tensor = _Encoder.apply(layers, x, *weights)
        return encoded
    for layer, own in zip(layers, _by_block(weights), strict=True):
        x, _ = _forward(layer, x, own)
    return x


def _layer(block: EncoderBlock, atoms: int, batch: CrystalBatch) -> Layer:
    from crystalformer.ops.numba import kernels_of

    attention = block.attention
    config, scale = attention.config, attention.config.layer_scale_real(attention.layer)
    s, t = attention.statistics.tolist()
    shape = (atoms, config.head_num, config.head_dim)
    shells = batch.shells(config.cutoff_sigmas * scale / config.gauss_lb_real**0.5)
    return Layer(
        kernels=kernels_of(shells, shape, attention.radial, config.cutoff_sigmas),
        shape=shape,
        scale=s,
        shift=t,
        precision=1.0 / (2.0 * scale**2),
        positive=attention.positive,
        lower=config.gauss_lb_real,
    )


def _weights(block: EncoderBlock) -> Weights:
    attention, first, second = block.attention, block.linear1, block.linear2
    q, k, v, out = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj
    return Weights(
        query=q.weight,
        query_bias=q.bias,
        key=k.weight,
        key_bias=k.bias,
        value=v.weight,
        value_bias=v.bias,
        out=out.weight,
        out_bias=out.bias,
        first=first.weight,
        first_bias=first.bias,
        second=second.weight,
        second_bias=second.bias,
        direction=attention.gauss_direction,
        radial=attention.radial_weight,
    )


def _by_block(weights: Sequence[Tensor | None]) -> list[Weights]:
    size = len(Weights._fields)
    return [Weights(*weights[i : i + size]) for i in range(0, len(weights), size)]  # type: ignore[arg-type]


class _Encoder(torch.autograd.Function):
    """``_forward`` of the blocks in turn, and their gradient."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[Layer], x: Tensor, *weights: Tensor | None) -> Tensor:  # noqa: ANN401
        """Features (N, F)."""
        kept = []
        for layer, own in zip(layers, _by_block(weights), strict=True):
            x, one = _forward(layer, x, own)
            kept.append(one)
        ctx.layers = layers
        ctx.save_for_backward(*weights, *(tensor for one in kept for tensor in one))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Of x and the weights, in their order."""
        saved, count = ctx.saved_tensors, len(ctx.layers) * len(Weights._fields)
        size = len(Kept._fields)
        kept = [Kept(*saved[i : i + size]) for i in range(count, len(saved), size)]
        gradients: list[Tensor | None] = []
        for layer, own, one in reversed(list(zip(ctx.layers, _by_block(saved[:count]), kept, strict=True))):
            dx, of_block = _backward(layer, dx, own, one)
            gradients[:0] = of_block
        return None, dx, *gradients


def _forward(layer: Layer, x: Tensor, w: Weights) -> tuple[Tensor, Kept]:
    q, k, v = (
        torch.addmm(bias, x, weight.t()).view(layer.shape)
        for weight, bias in ((w.query, w.query_bias), (w.key, w.key_bias), (w.value, w.value_bias))
    )
    argument = (q * w.direction).sum(-1)
    if layer.scale != 0:
        argument.add_(layer.shift).mul_(layer.scale)
    rho = positive(argument, layer.positive, layer.lower)
    radial = None if w.radial is None else w.radial.contiguous()
    attended, memory = layer.kernels.forward((q, k, v), rho * layer.precision, radial)
    y = attended.view(x.shape)
    x1 = torch.addmm(w.out_bias, y, w.out.t()).add_(x)
    hidden = torch.addmm(w.first_bias, x1, w.first.t()).relu_()
    x2 = torch.addmm(w.second_bias, hidden, w.second.t()).add_(x1)
    return x2, Kept(x, q, argument, rho, memory, y, x1, hidden)


def _backward(layer: Layer, dx2: Tensor, w: Weights, kept: Kept) -> tuple[Tensor, Weights]:
    shape = dx2.shape
    dhidden = torch.ops.aten.threshold_backward(dx2 @ w.second, kept.hidden, 0)
    dx1 = torch.addmm(dx2, dhidden, w.first)
    dy = (dx1 @ w.out).view(layer.shape)
    dq, dk, dv, dc, dradial = layer.kernels.backward(dy, kept.memory, 0 if w.radial is None else len(w.radial))
    dargument = positive_slope(kept.rho, kept.argument, layer.positive, layer.lower)
    dargument.mul_(dc).mul_(layer.precision * (layer.scale or 1.0)).unsqueeze_(-1)
    dq.addcmul_(dargument, w.direction)
    ddirection = (dargument * kept.q).sum(0)
    dq, dk, dv = dq.view(shape), dk.view(shape), dv.view(shape)
    dx = torch.addmm(dx1, dq, w.query).addmm_(dk, w.key).addmm_(dv, w.value)
    x = kept.x
    pairs = ((dq, x), (dk, x), (dv, x), (dx1, kept.y), (dhidden, kept.x1), (dx2, kept.hidden))
    linear = [gradient for out, given in pairs for gradient in (out.t() @ given, out.sum(0))]
    return dx, Weights(*linear, ddirection, None if w.radial is None else dradial)  # type: ignore[call-arg]
