"""The model under torch.compile: one full graph with dynamic shapes, the same numbers as eager, in every domain."""

import shutil

import numpy as np
import pytest
import torch
import torch._dynamo

from crystalformer import CrystalBatch, Crystalformer, ModelConfig
from crystalformer.ops import torch_backend
from crystalformer.ops.blocks import PLANS
from crystalformer.ops.numba import custom_op

SMALL = dict(num_layers=1, model_dim=32, head_num=4, ff_dim=64, embedding_dim=[32], value_pe_dist_real=16)
"""Of one layer, which compiles in half the time; two are compiled where layers differ, or may compile apart."""


def crystals(seed: int, sizes: list[int]) -> CrystalBatch:
    """Random crystals with 12 Å³ an atom."""
    rng = np.random.default_rng(seed)
    lattice = np.stack([np.eye(3) * (12 * n) ** (1 / 3) + rng.uniform(-0.2, 0.2, (3, 3)) for n in sizes])
    positions = np.concatenate([rng.random((n, 3)) @ cell for n, cell in zip(sizes, lattice, strict=True)])
    return CrystalBatch.from_arrays(positions, rng.integers(1, 90, sum(sizes)), lattice, sizes)


BATCHES = ([3, 5, 2, 7, 1], [4, 20, 7, 1, 2, 6], [6, 6], [1, 2, 9, 4, 3, 3, 3])
"""Atoms of each crystal. The first batch's sizes equal no other dimension: torch would take the two for one."""


def frozen_model(dtype: torch.dtype, backend: str = "torch", **settings) -> Crystalformer:
    torch.manual_seed(0)
    model = Crystalformer(ModelConfig(**{**SMALL, **settings}), backend=backend).to(dtype)
    model.freeze_statistics(crystals(9, [5, 4, 6]))
    return model


def gradients(model: Crystalformer, output: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def compare(compiled: Crystalformer, model: Crystalformer, sizes: list[int], tolerance: float) -> None:
    batch = model.prepare(crystals(len(sizes), sizes))
    expected = model(batch)
    expected_gradients = gradients(model, expected)
    found = compiled(batch)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.detach().abs().max()))
    scale = max(float(value.abs().max()) for value in expected_gradients.values())
    for name, value in gradients(model, found).items():
        torch.testing.assert_close(value, expected_gradients[name], rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("domain", "dtype", "backend"),
    [
        ("reci", torch.float32, "auto"),
        ("real-reci", torch.float32, "auto"),
        ("multihead", torch.float64, "torch"),
    ],
)
def test_full_graph_gives_the_eager_numbers(domain: str, dtype: torch.dtype, backend: str) -> None:
    """In the other domains; real space alone is compared below, over more batches."""
    torch._dynamo.reset()
    model = frozen_model(dtype, backend, domain=domain, num_layers=1 if domain == "reci" else 2)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for sizes in BATCHES[:2]:
        compare(compiled, model, sizes, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_other_batches_do_not_compile_again(backend: str) -> None:
    torch._dynamo.reset()
    model = frozen_model(torch.float32, backend, num_layers=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in BATCHES:
            compare(compiled, model, sizes, 1e-5)


@pytest.mark.slow
def test_inductor_gives_the_eager_numbers() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile's inductor needs a C++ compiler on the CPU; none is on PATH")
    torch._dynamo.reset()
    model = frozen_model(torch.float32)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for sizes in BATCHES[:2]:
        compare(compiled, model, sizes, 1e-4)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_autocast_computes_attention_in_float32(backend: str) -> None:
    """bf16 activations around it: the output differs from float32's by the rounding of bf16, not by much more."""
    torch._dynamo.reset()
    model = frozen_model(torch.float32, backend)
    batch = model.prepare(crystals(3, [4, 7, 20]))
    expected = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(batch)
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")(batch)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))
    torch.testing.assert_close(compiled, found, rtol=0.02, atol=0.02 * float(expected.detach().abs().max()))


@pytest.mark.parametrize(("domain", "backend"), [("real", "torch"), ("real", "numba"), ("multihead", "auto")])
def test_a_bf16_model_trains(domain: str, backend: str) -> None:
    model = frozen_model(torch.float32, backend, domain=domain).to(torch.bfloat16)
    output = model(crystals(3, [4, 7, 20]))
    found = gradients(model, output)
    assert output.dtype == torch.bfloat16
    assert all(bool(value.isfinite().all()) for value in found.values())


@pytest.mark.parametrize("weighted", [True, False])
def test_the_operators_are_proper(weighted: bool) -> None:
    """Schema, fake tensors, autograd registration and dynamic shapes, as torch checks them."""
    batch = crystals(4, [3, 6])
    model = frozen_model(torch.float64, domain="multihead")
    model.prepare(batch)
    attention = model.blocks[0].attention
    x = model.embed(batch).detach()
    q, k, v = (p(x).view(len(x), 4, -1).detach().requires_grad_() for p in (attention.q_proj,) * 3)
    rho = torch.rand(len(x), 4, dtype=torch.float64).add_(0.5).requires_grad_()
    blocks = next(iter(next(iter(batch._shells.values())).cache.values()))
    weight = torch.rand(4, 8, 16, dtype=torch.float64, requires_grad=True) if weighted else None
    basis = [16.0, 14.0, 0.875] if weighted else []
    torch.library.opcheck(torch_backend._attention, (q, k, v, rho * 0.25, weight, blocks, basis, 6.0))
    waves = next(iter(batch.cache.values()))
    torch.library.opcheck(torch_backend._reciprocal, (q, k, v, rho, waves, 2.2))


def test_operands_that_lie_otherwise_in_memory_are_traced_as_they_come_out() -> None:
    batch = crystals(4, [3, 6])
    frozen_model(torch.float64, domain="multihead").prepare(batch)
    q, k, v = (torch.randn(9, 8, 4, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3))
    rho = torch.rand(4, 9, dtype=torch.float64).add_(0.5).T.requires_grad_()
    weight = torch.rand(4, 16, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    blocks = next(iter(next(iter(batch._shells.values())).cache.values()))
    torch.library.opcheck(torch_backend._attention, (q, k, v, rho, weight, blocks, [16.0, 14.0, 0.875], 6.0))
    waves = next(iter(batch.cache.values()))
    torch.library.opcheck(torch_backend._reciprocal, (q, k, v, rho, waves, 2.2))


@pytest.mark.parametrize("weighted", [True, False])
def test_the_numba_operator_is_proper(weighted: bool) -> None:
    batch = crystals(4, [3, 6])
    q, k, v = (torch.randn(9, 4, 8, requires_grad=True) for _ in range(3))
    precision = torch.rand(9, 4).add_(0.5).requires_grad_()
    weight = torch.rand(4, 8, 16, requires_grad=True) if weighted else None
    basis = [16.0, 14.0, 0.875] if weighted else []
    given = (q, k, v, precision, weight, custom_op.plan(batch.shells(8.0)), basis, 6.0)
    torch.library.opcheck(custom_op._attention, given, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("domain", ["real", "reci"])
def test_a_graph_keeps_the_plan_of_a_batch_that_is_gone(domain: str) -> None:
    torch._dynamo.reset()
    model = frozen_model(torch.float32, "auto", domain=domain)
    expected = gradients(model, model(crystals(3, [4, 7])))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    found = gradients(model, compiled(model.prepare(crystals(3, [4, 7]))))
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * scale)


def test_a_number_without_a_plan_is_refused() -> None:
    with pytest.raises(RuntimeError, match="there is no plan -1"):
        PLANS.plan(torch.tensor(-1))
