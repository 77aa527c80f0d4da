"""rho: what bounds the precision of an atom's Gaussians (model.md, section 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from crystalformer.config import PositiveFunction


def positive(x: Tensor, function: PositiveFunction, lower: float) -> Tensor:
    """rho(x) >= lower (model.md, section 1): elementwise, any shape."""
    b, beta = lower, function.beta
    if function.name == "elu":
        # In one operation, whose scales are those of both sides, of the left one and of its argument.
        elu: Tensor = torch.ops.aten.elu(x, (1 - b) / beta, beta, beta / (1 - b))
        return elu + 1.0
    if function.name == "abs":
        return (1 - b) * x.abs() + b
    if function.name == "exp":
        return (1 - b) * torch.exp(x * (beta / (1 - b))) + b
    if function.name == "softplus":
        shift = (1 - b) + math.log(-math.expm1(-beta * (1 - b))) / beta  # log(expm1(beta (1 - b))) / beta
        return functional.softplus(x + shift, beta=beta) + b
    slope = beta * (1 + b) / (1 - b)
    return (1 / b - b) * torch.sigmoid(x * slope + math.log(b)) + b
