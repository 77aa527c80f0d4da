"""rho of positive.py, number by number, and its derivative: for compiled code."""

from __future__ import annotations

import math
from typing import NamedTuple

from crystalformer.ops.numba.simd import compiled

FUNCTIONS = ("elu", "abs", "exp", "softplus", "sigmoid")
_ELU, _ABS, _EXP, _SOFTPLUS, _SIGMOID = range(len(FUNCTIONS))

_LINEAR = 20.0
"""Argument times beta from which torch takes softplus for linear."""


class Rho(NamedTuple):
    """Which of the FUNCTIONS, its beta, and its lower bound b."""

    function: int
    beta: float
    lower: float


@compiled
def rho_of(x: float, rho: Rho) -> float:
    """rho(x) (model.md, section 1)."""
    b, beta = rho.lower, rho.beta
    if rho.function == _ELU:
        return 1.0 + (beta * x if x > 0 else (1 - b) * math.expm1(x * beta / (1 - b)))
    if rho.function == _ABS:
        return (1 - b) * abs(x) + b
    if rho.function == _EXP:
        return (1 - b) * math.exp(x * beta / (1 - b)) + b
    if rho.function == _SOFTPLUS:
        argument = beta * (x + 1 - b) + math.log(-math.expm1(-beta * (1 - b)))
        return (argument if argument > _LINEAR else math.log1p(math.exp(argument))) / beta + b
    return (1 / b - b) / (1 + math.exp(-x * beta * (1 + b) / (1 - b)) / b) + b


@compiled
def slope_of(x: float, value: float, rho: Rho) -> float:
    """Derivative of rho at x, where it is ``value``."""
    b, beta = rho.lower, rho.beta
    if rho.function == _ELU:
        return beta if x > 0 else (value - b) * beta / (1 - b)
    if rho.function == _ABS:
        return math.copysign(1 - b, x) if x != 0 else 0.0
    if rho.function == _EXP:
        return (value - b) * beta / (1 - b)
    if rho.function == _SOFTPLUS:
        return -math.expm1((b - value) * beta)
    above = value - b
    return above * (1 - above / (1 / b - b)) * beta * (1 + b) / (1 - b)
