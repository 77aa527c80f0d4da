"""Batch normalization over the global batch, whatever part of it each worker holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.worker.collective import differentiable_sum


class GlobalBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d whose training statistics are those of all workers' rows together; same weights and buffers."""

    def forward(self, x: Tensor) -> Tensor:
        """(rows, features) normalized; in training by the global batch's mean and variance."""
        if not self.training or not dist.is_initialized():
            local: Tensor = super().forward(x)
            return local
        # float64: the mean of squares less the square of the mean loses digits, and bfloat16 cannot count to 257.
        wide = x.double()
        sums = torch.cat([wide.sum(0), wide.square().sum(0), wide.new_full((1,), len(x))])
        total, squares, count = differentiable_sum(sums).split([x.shape[1], x.shape[1], 1])
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        self._track(mean.detach(), variance.detach() * count / (count - 1).clamp_min(1))
        normalized = ((wide - mean) * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)
        output: Tensor = (normalized * self.weight + self.bias).to(x.dtype)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Running statistics: exponential, or the plain mean of all batches where momentum is None."""
        if self.num_batches_tracked is None or self.running_mean is None or self.running_var is None:
            return
        self.num_batches_tracked.add_(1)
        share = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


def make_global(module: nn.Module) -> None:
    """Turn every BatchNorm1d inside ``module`` into a GlobalBatchNorm with the same weights."""
    for child in module.modules():
        if type(child) is nn.BatchNorm1d:
            child.__class__ = GlobalBatchNorm


def has_batch_norm(module: nn.Module) -> bool:
    """Whether there are running statistics in ``module``."""
    return any(isinstance(child, nn.BatchNorm1d) for child in module.modules())


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Within, running statistics start anew and become the plain mean over the batches that are passed through."""
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm1d)]
    momenta = [norm.momentum for norm in norms]
    training = module.training
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    module.train()
    try:
        yield
    finally:
        module.train(training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
