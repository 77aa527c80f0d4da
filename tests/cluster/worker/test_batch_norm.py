"""Batch normalization over workers against torch's own over all rows at once."""

import pytest
import torch
from torch import nn

from cluster.worker.batch_norm import GlobalBatchNorm, has_batch_norm, make_global, recomputing

FEATURES = 6


def rows_of(steps: int = 2) -> torch.Tensor:
    """(steps, 12, 6): means far from 0, as a bias makes them."""
    torch.manual_seed(5)
    return torch.randn(steps, 12, FEATURES) * torch.logspace(-2, 1, FEATURES) + torch.linspace(-30, 30, FEATURES)


def new_norm() -> nn.Sequential:
    torch.manual_seed(6)
    module = nn.Sequential(nn.BatchNorm1d(FEATURES))
    nn.init.normal_(module[0].weight)
    nn.init.normal_(module[0].bias)
    return module


def train(module: nn.Module, steps: list[torch.Tensor]) -> dict:
    """Forward and backward of every step; the loss is a sum over rows, so its gradient is one over all workers."""
    outputs, gradients = [], []
    for rows in steps:
        x = rows.clone().requires_grad_()
        output = module(x)
        (output.square() * torch.arange(1.0, FEATURES + 1)).sum().backward()
        outputs.append(output.detach())
        gradients.append(x.grad)
    return {
        "outputs": outputs,
        "gradients": gradients,
        "weight": module[0].weight.grad,
        "bias": module[0].bias.grad,
        "buffers": dict(module.named_buffers()),
    }


def share_of(place, rows: torch.Tensor) -> torch.Tensor:
    """Unequal parts: all rows; 4 and 8; 4, 5 and 3."""
    cuts = {1: [12], 2: [4, 8], 3: [4, 5, 3]}[place.world_size]
    return rows.split(cuts)[place.rank]


def train_share(place) -> dict:
    module = new_norm()
    make_global(module)
    return train(module, [share_of(place, rows) for rows in rows_of()])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_training_is_that_of_all_rows_at_once(workers, size):
    expected = train(new_norm().double(), list(rows_of().double()))  # torch's own float32 loses digits here
    found = workers(size).run(train_share)
    for step in range(2):
        for key, tolerance in (("outputs", 1e-5), ("gradients", 1e-4)):  # of up to 9 and 110
            joined = torch.cat([worker[key][step] for worker in found])
            assert torch.allclose(joined.double(), expected[key][step], rtol=1e-5, atol=tolerance), key
    for key in ("weight", "bias"):
        summed = sum(worker[key] for worker in found)
        assert torch.allclose(summed.double(), expected[key], rtol=1e-5, atol=1e-5), key
    for worker in found:
        for name, value in expected["buffers"].items():
            assert torch.allclose(worker["buffers"][name].to(value.dtype), value, rtol=1e-6), name
            assert torch.equal(worker["buffers"][name], found[0]["buffers"][name]), name


def evaluate_share(place) -> torch.Tensor:
    module = new_norm()
    make_global(module)
    module[0].running_mean.fill_(2.0)
    return module.eval()(share_of(place, rows_of()[0]))


def test_evaluation_uses_the_running_statistics(two_workers):
    module = new_norm()
    module[0].running_mean.fill_(2.0)
    expected = module.eval()(rows_of()[0])
    assert torch.equal(torch.cat(two_workers.run(evaluate_share)), expected)


def bfloat16_share(place) -> tuple[torch.Tensor, torch.Tensor]:
    module = GlobalBatchNorm(1, affine=True)
    ones = torch.ones(200 + 100 * place.rank, 1, dtype=torch.bfloat16)
    output = module(ones * place.rank)
    return output, module.running_mean


def test_bfloat16_rows_are_counted_exactly(two_workers):
    """500 rows, 300 of them 1: bfloat16 itself has no 300."""
    (output, mean), _ = two_workers.run(bfloat16_share)
    assert output.dtype == torch.bfloat16
    assert mean.item() == pytest.approx(0.1 * 300 / 500)


def recompute_share(place) -> dict:
    module = new_norm()
    make_global(module)
    module.eval()
    module[0].running_mean.fill_(99.0)
    with recomputing(module), torch.no_grad():
        assert module.training
        for rows in rows_of(3):
            module(share_of(place, rows))
    assert not module.training
    assert module[0].momentum == 0.1
    return {name: value.clone() for name, value in module.named_buffers()}


@pytest.mark.parametrize("size", [1, 2])
def test_recomputed_statistics_are_plain_means_over_batches(workers, size):
    found = workers(size).run(recompute_share)[-1]
    rows = rows_of(3)
    assert torch.allclose(found["0.running_mean"], rows.mean(1).mean(0), rtol=1e-5)
    assert torch.allclose(found["0.running_var"], rows.var(1).mean(0), rtol=1e-4)
    assert found["0.num_batches_tracked"].item() == 3


def test_only_batch_norms_are_made_global():
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
    assert has_batch_norm(module)
    assert not has_batch_norm(module[0])
    kept = module.state_dict()
    make_global(module)
    assert [type(child) for child in module] == [nn.Linear, GlobalBatchNorm, nn.ReLU]
    assert all(torch.equal(module.state_dict()[name], value) for name, value in kept.items())
