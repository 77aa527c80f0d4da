"""The radial basis b(d) of the values (model.md, section 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True, slots=True)
class RadialBasis:
    """K Gaussians b(d)_k = exp(-(d - mu_k)^2 / (2 width^2)) with mu_k = k r_max / K, k = 1..K; lengths in Å."""

    count: int
    r_max: float
    width: float

    def centers(self, like: Tensor) -> Tensor:
        """(K,) mu_k in Å, with the dtype and device of ``like``."""
        return torch.arange(1, self.count + 1, dtype=like.dtype, device=like.device) * (self.r_max / self.count)

    def __call__(self, distance: Tensor) -> Tensor:
        """b of distances (...) in Å, as (..., K)."""
        offset = distance.unsqueeze(-1) - self.centers(distance)
        return vanishing_exp_(offset.square_().mul_(-0.5 / self.width**2))


def vanishing_exp_(exponent: Tensor) -> Tensor:
    """exp, in place; 0 from ``lowest_exponent`` down, since what is cut off must not count in a gradient either."""
    return functional.threshold(exponent, lowest_exponent(exponent.dtype), -math.inf, inplace=True).exp_()


def lowest_exponent(dtype: torch.dtype) -> float:
    """Exponentials end here, far below rounding, so that no product of two of them is a denormal number.

    Arithmetic on denormals is some fifty times slower on CPUs; exp(-32) = 1e-14 beside 1 is nothing in float32.
    """
    return -200.0 if dtype == torch.float64 else -32.0
