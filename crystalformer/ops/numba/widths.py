"""Widths of the Gaussians from the queries: c = rho(s (omega q + t)) / (2 scale²), model.md's section 1, and back.

Legend of shapes: operands.py.
"""

from __future__ import annotations

import math

import numpy as np

from crystalformer.ops.numba.operands import Gradients, Kept, Rho, Sizes
from crystalformer.ops.numba.simd import LANES, compiled, fma, load, mul, splat, store

_ZERO = np.float32(0.0)

FUNCTIONS = ("elu", "abs", "exp", "softplus", "sigmoid")
"""Positive functions by their place here, which is what compiled code takes for a name."""


@compiled
def positive(x: float, rho: Rho) -> tuple[float, float]:
    """rho(x) and its derivative."""
    b, beta = rho.lower, rho.beta
    if rho.function == 0:
        if x > 0:
            return 1.0 + beta * x, beta
        power = math.exp(x * beta / (1.0 - b))
        return (1.0 - b) * (power - 1.0) + 1.0, beta * power
    if rho.function == 1:
        sign = 0.0 if x == 0 else math.copysign(1.0, x)
        return (1.0 - b) * abs(x) + b, (1.0 - b) * sign
    if rho.function == 2:  # noqa: PLR2004 - of FUNCTIONS
        power = math.exp(x * beta / (1.0 - b))
        return (1.0 - b) * power + b, beta * power
    if rho.function == 3:  # noqa: PLR2004
        exponent = beta * x + math.log(math.expm1(beta * (1.0 - b)))
        value = max(exponent, 0.0) + math.log1p(math.exp(-abs(exponent)))
        return value / beta + b, 1.0 / (1.0 + math.exp(-exponent))
    slope = beta * (1.0 + b) / (1.0 - b)
    part = 1.0 / (1.0 + math.exp(-x * slope - math.log(b)))
    return (1.0 / b - b) * part + b, (1.0 / b - b) * slope * part * (1.0 - part)


@compiled
def widths(sizes: Sizes, rho: Rho, kept: Kept) -> None:
    """Fill c and slope, its derivative by omega q, from q and omega."""
    features = sizes.features * LANES
    for group in range(sizes.groups):
        for atom in range(group * sizes.atoms, (group + 1) * sizes.atoms):
            a = splat(_ZERO)
            for d in range(0, features, LANES):
                a = fma(load(kept.q, atom * features + d), load(kept.omega, group * features + d), a)
            store(kept.c, atom * LANES, a)
            for lane in range(atom * LANES, (atom + 1) * LANES):
                value, slope = positive(rho.scale * (kept.c[lane] + rho.shift), rho)
                kept.c[lane] = value * rho.factor
                kept.slope[lane] = slope * rho.scale * rho.factor


@compiled
def backward_widths(sizes: Sizes, first: int, last: int, kept: Kept, grads: Gradients) -> None:
    """Add to dq of atoms first..last-1 what they do to dc, and fill the parts of domega that they make."""
    features = sizes.features * LANES
    for begin in range(first, last, sizes.part):
        for group in range(sizes.groups):
            out, omega = ((begin // sizes.part) * sizes.groups + group) * features, group * features
            for d in range(0, features, LANES):
                store(grads.domega, out + d, splat(_ZERO))
            for i in range(begin, min(begin + sizes.part, last)):
                atom = group * sizes.atoms + i
                da = mul(load(grads.dc, atom * LANES), load(kept.slope, atom * LANES))
                for d in range(0, features, LANES):
                    x, w = atom * features + d, out + d
                    store(grads.dq, x, fma(da, load(kept.omega, omega + d), load(grads.dq, x)))
                    store(grads.domega, w, fma(da, load(kept.q, x), load(grads.domega, w)))
