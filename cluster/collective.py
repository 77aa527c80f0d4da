"""Sums over the workers; the identity where there is one process and no group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(value: Tensor, *, maximum: bool = False) -> Tensor:
    """The sum (or maximum) of ``value`` over all workers, in place; every worker gets the same bits."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return value


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum over all workers, not in place; gradients flow back to every worker's ``value``."""
    total: Tensor = _DifferentiableSum.apply(value)
    return total


class _DifferentiableSum(torch.autograd.Function):
    """Every worker's loss depends on the sum, so its gradient is summed over the workers too."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        return all_reduce(value.clone())

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        return all_reduce(gradient.clone())
