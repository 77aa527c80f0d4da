"""Sums over the workers; the identity where there is one process and no group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce(value: Tensor, *, maximum: bool = False) -> Tensor:
    """The sum (or maximum) of ``value`` over all workers, in place; every worker gets the same bits.

    ``value`` may lie on the CPU while the workers talk by NCCL, which takes nothing but what lies on a GPU.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        within_reach = value.to(_reached(value.device))
        dist.all_reduce(within_reach, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
        if within_reach is not value:
            value.copy_(within_reach)
    return value


def _reached(device: torch.device) -> torch.device:
    """``device`` where the group's backends serve its type, else this process's own of a type that they do."""
    types = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]  # "cuda:nccl"
    return device if device.type in types else torch.device(types[0])


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
