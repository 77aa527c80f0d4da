"""When and how an encoder block runs as one operation (ops/numba/block.py) instead of part by part: on CPUs.

The result is the same but for rounding; an epoch of the default model takes two thirds of the time.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.ops import chosen_backend

if TYPE_CHECKING:
    from crystalformer.layers import EncoderBlock, PeriodicAttention


def takes(block: EncoderBlock, x: Tensor) -> bool:
    """Whether ``forward`` does for the block and its input x (N, model_dim).

    It does in real space and float32 where the numba backend is chosen; not in a graph to compile, under autocast, or
    where a part has hooks that wait for its call (ZeRO 3 gathers each part's weights by one).
    """
    own: Any = block.attention
    if own.config.layer_domain(own.layer) != "real" or not x.dtype == own.gauss_direction.dtype == torch.float32:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or _hooked(block):
        return False
    return chosen_backend(own.backend, own.gauss_direction.unsqueeze(0), own.radial) == "numba"


def _hooked(block: EncoderBlock) -> bool:
    own = block.attention
    parts = own, own.q_proj, own.k_proj, own.v_proj, own.out_proj, block.linear1, block.linear2
    return any(part._forward_pre_hooks or part._forward_hooks or part._backward_hooks for part in parts)


def forward(block: EncoderBlock, x: Tensor, batch: CrystalBatch) -> Tensor:
    """What the block makes of x: (N, model_dim)."""
    from crystalformer.ops.numba.block import BlockSettings, Weights, encoder_block

    own: Any = block.attention
    first, second = block.linear1, block.linear2
    config, scale, radial = own.config, own.config.layer_scale_real(own.layer), own.radial
    weights = Weights(
        *(own.q_proj.weight, own.k_proj.weight, own.v_proj.weight),
        *(own.q_proj.bias, own.k_proj.bias, own.v_proj.bias),
        *(own.gauss_direction, own.radial_weight),
        *(own.out_proj.weight, own.out_proj.bias),
        *(first.weight, first.bias, second.weight, second.bias),
    )
    settings = BlockSettings(
        heads=config.head_num,
        basis=() if radial is None else (float(radial.count), radial.r_max, radial.width),
        cutoff_sigmas=config.cutoff_sigmas,
        rho=_rho(own, scale),
    )
    radius = config.cutoff_sigmas * scale / math.sqrt(config.gauss_lb_real)
    return encoder_block(x, batch.shells(radius), weights, settings)


def _rho(attention: PeriodicAttention, scale: float) -> Any:  # noqa: ANN401 - operands.Rho, imported when it is wanted
    from crystalformer.ops.numba.operands import Rho
    from crystalformer.ops.numba.widths import FUNCTIONS

    config = attention.config
    s, t = attention.statistics.tolist()
    s, t = (s, t) if s != 0 else (1.0, 0.0)  # not frozen yet: as they are
    function, beta = FUNCTIONS.index(config.positive.name), config.positive.beta
    return Rho(s, t, function, beta, config.gauss_lb_real, 1.0 / (2.0 * scale**2))
