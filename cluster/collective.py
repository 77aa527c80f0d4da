"""Sums over the workers; the identity where there is one process and no group."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def all_reduce(value: Tensor, *, maximum: bool = False) -> Tensor:
    """The sum (or maximum) of ``value`` over all workers, in place; every worker gets the same bits."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
    return value
