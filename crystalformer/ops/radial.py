"""The radial basis b(d) of the values (model.md, section 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        return offset.square_().mul_(-0.5 / self.width**2).clamp_(min=lowest_exponent(distance.dtype)).exp_()


def lowest_exponent(dtype: torch.dtype) -> float:
    """Exponents are cut off here, far below rounding, so that no product of two exponentials is a denormal number.

    Arithmetic on denormals is some fifty times slower on CPUs; exp(-32) = 1e-14 beside 1 is nothing in float32.
    """
    return -200.0 if dtype == torch.float64 else -32.0
