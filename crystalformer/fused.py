"""The encoder on a CPU as one node of autograd, its blocks compiled: no graph between products and attention.

What is computed is layers.EncoderBlock, which says so in modules. Whatever looks into these or replaces them (hooks,
adapters, ZeRO 3, autocast, torch.compile, another dtype or device) gets them, as do sizes that the compiled passes do
not take. A step of 32 crystals takes 60 %, one of 128 75 to 85 % of the modules' time (tests/benchmarks/RESULTS.md).

Legend: N atoms, F = model_dim = H·D, M = ff_dim; others as in batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from crystalformer.batch import CrystalBatch, PackedShells
from crystalformer.layers import EncoderBlock, PeriodicAttention
from crystalformer.ops.attention import chosen_backend

if TYPE_CHECKING:
    from crystalformer.ops.numba.encoder import Encoder, Layer


def applies(blocks: Sequence[EncoderBlock], x: Tensor) -> bool:
    """Whether the compiled passes take the features x (N, F), and nobody looks at what is inside the blocks."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    attention = blocks[0].attention
    like = attention.gauss_direction
    if attention.config.domain != "real" or like.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if hasattr(like, "ds_id"):  # ZeRO 3 gathers weights where modules are called
        return False
    if _has_any_global_hook() or not all(_is_plain(module) for block in blocks for module in block.inside):
        return False
    if chosen_backend(attention.backend, "real", like, attention.radial) != "numba":
        return False
    from crystalformer.ops.numba.encoder import fits

    return fits(attention.config.model_dim, attention.config.ff_dim)


def _is_plain(module: nn.Module) -> bool:
    """Whether it computes what its class here does, and nobody is told."""
    if type(module) not in (EncoderBlock, PeriodicAttention, nn.Linear) or "forward" in vars(module):
        return False
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return not any(hooks)


def encode(blocks: Sequence[EncoderBlock], x: Tensor, batch: CrystalBatch) -> Tensor:
    """Features (N, F) after the blocks, from those before them, where this ``applies``."""
    from crystalformer.ops.numba.encoder import Encoder

    config = blocks[0].attention.config
    shells = batch.shells(config.neighborhood.radius)  # one list for all, and one order of its atoms
    layers = [_layer(block, len(x), shells) for block in blocks]
    rho = config.positive.name, config.positive.beta, config.gauss_lb_real
    encoder = Encoder(layers, config.ff_dim, rho)
    weights = [w if w is None else w.contiguous() for block in blocks for w in _weights(block)]
    plan = layers[0].attention.plan
    order = None if plan.placed is plan.arrays else torch.from_numpy(plan.arrays.order)
    x = (x if order is None else x.index_select(0, order)).contiguous()
    if torch.is_grad_enabled():
        x = _Encoder.apply(encoder, x, *weights)
    else:
        x, _ = encoder.forward(x, weights, keep=False)
    return x if order is None else x.index_select(0, order.argsort())


def _layer(block: EncoderBlock, atoms: int, shells: PackedShells) -> Layer:
    from crystalformer.ops.numba import kernels_of
    from crystalformer.ops.numba.encoder import Layer

    attention = block.attention
    config, scale = attention.config, attention.config.layer_scale_real(attention.layer)
    s, t = attention.statistics.tolist()
    shape = (atoms, config.head_num, config.head_dim)
    kernels = kernels_of(shells, shape, attention.radial, config.cutoff_sigmas)
    return Layer(kernels, s, t, 1.0 / (2.0 * scale**2))


def _weights(block: EncoderBlock) -> list[Tensor | None]:
    """In the order of ops.numba.block."""
    attention = block.attention
    linear = attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, block.linear1, block.linear2
    own = [parameter for module in linear for parameter in (module.weight, module.bias)]
    return [*own, attention.gauss_direction, attention.radial_weight]


class _Encoder(torch.autograd.Function):
    """An Encoder's forward and its gradient."""

    @staticmethod
    def forward(ctx: Any, encoder: Encoder, x: Tensor, *weights: Tensor | None) -> Tensor:  # noqa: ANN401
        """Features (N, F)."""
        out, memory = encoder.forward(x, weights, keep=True)
        ctx.encoder = encoder
        ctx.save_for_backward(x, memory, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx2: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401 - torch's context
        """Of x and the weights, in their order."""
        x, memory, *weights = ctx.saved_tensors
        dx, gradients = ctx.encoder.backward(dx2.contiguous(), x, memory, weights)
        return None, dx, *gradients
