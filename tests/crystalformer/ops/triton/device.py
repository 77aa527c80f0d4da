"""Where the tests of test_gpu*.py run: on a GPU, or on the CPU, through Triton's interpreter (test_interpreter.py).

What they compare with is computed on the CPU in both cases.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from crystalformer import CrystalBatch, Crystalformer, ModelConfig
from crystalformer.ops import attention
from crystalformer.ops.triton import launch
from tests.crystalformer.crystals import batch_of, random_crystal
from tests.crystalformer.ops import operands
from tests.crystalformer.ops.operands import Operands

INTERPRETED = launch.INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"

MARKS = [pytest.mark.usefixtures("auto_is_triton"), *([] if INTERPRETED else [pytest.mark.gpu])]
"""Of a file whose tests run in both places; tests that nothing but a GPU can run are marked one by one."""

CUTOFF = 7.0
"""Sigmas: the truncation, exp(-24.5) = 2e-11 a Gaussian, is then far below the rounding of float32."""

ROUNDING = 64 * torch.finfo(torch.float32).eps
"""8e-6, for sums in another order: what a backend may round beside twice the oracle, as in test_torch_backend.py."""


@pytest.fixture
def auto_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter the CPU is the GPU: backend="auto" has Triton in the table of kernels for it, too."""
    if INTERPRETED:
        monkeypatch.setitem(attention._KERNELS, "cpu", "triton")


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts what is launched while it lasts: operators by their qualified names, backward passes too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))

    def ours(self) -> dict[str, int]:
        """The calls of our own operators."""
        return {name: count for name, count in self.calls.items() if name.startswith("crystalformer::")}


def make_batch(sizes: tuple[int, ...], seed: int = 0) -> CrystalBatch:
    """Random crystals of mixed elements, on the CPU."""
    return batch_of(*(random_crystal(n, seed=seed + n + 100 * place, skew=0.25) for place, n in enumerate(sizes)))


def on(given: Operands, device: str) -> Operands:
    """The operands on a device."""
    return changed(given, lambda value: value.to(device))


def changed(given: Operands, change: Callable[[Tensor], Tensor]) -> Operands:
    """The operands with every tensor changed."""
    tensors: dict[str, Any] = {n: change(value) for n, value in vars(given).items() if isinstance(value, Tensor)}
    return replace(given, **tensors)


def attend(
    batch: CrystalBatch, given: Operands, backend: str, device: str = DEVICE, cutoff_sigmas: float = CUTOFF
) -> dict[str, Tensor]:
    """``operands.attend`` on a device, results on the CPU."""
    found = operands.attend(batch.to(device), on(given, device), backend, cutoff_sigmas)
    return {name: value.cpu() for name, value in found.items()}


def judge(batch: CrystalBatch, given: Operands) -> Callable[[dict[str, Tensor]], None]:
    """Asserts of y and every gradient: within twice the float32 oracle's error or ROUNDING of the float64 oracle."""
    exact = attend(batch, given.to(torch.float32).to(torch.float64), "reference", "cpu")
    rounded = attend(batch, given.to(torch.float32), "reference", "cpu")
    limits = {name: max(2 * error, ROUNDING) for name, error in operands.errors(rounded, exact).items()}

    def check(found: dict[str, Tensor]) -> None:
        for name, error in operands.errors(found, exact).items():
            assert error < limits[name], (name, error, limits[name])

    return check


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch.set_float32_matmul_precision, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


SMALL: dict[str, Any] = {
    "num_layers": 2,
    "model_dim": 32,
    "head_num": 4,
    "ff_dim": 48,
    "embedding_dim": (24,),
    "value_pe_dist_real": 16,
    "scale_real": 0.7,
}


def new_model(domain: str, backend: str, **settings: Any) -> Crystalformer:
    return Crystalformer(ModelConfig(**{**SMALL, "domain": domain, **settings}), backend=backend)


@cache
def weights(domain: str) -> dict[str, Tensor]:
    """float32 weights with statistics of a first batch."""
    torch.manual_seed(0)
    model = new_model(domain, "torch")
    model.freeze_statistics(make_batch((4, 6), seed=5))
    return model.state_dict()


def model_of(domain: str, backend: str, where: str, **settings: Any) -> Crystalformer:
    """A float32 model with those weights."""
    model = new_model(domain, backend, **settings)
    model.load_state_dict(weights(domain))
    return model.to(where)


def outcome(
    model: Crystalformer, batch: CrystalBatch, forward: Callable[[CrystalBatch], Tensor] | None = None
) -> dict[str, Tensor]:
    """Output and gradients, by name; forward: what computes the model's output in place of itself."""
    output = model(batch) if forward is None else forward(batch)
    leaves = dict(model.named_parameters())
    gradients = torch.autograd.grad(output.float().square().sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Of the outputs, relative to the largest, and of all gradients as one vector, relative to its length."""
    output, gradient = _joined(found)
    expected_output, expected_gradient = _joined(expected)
    return (
        float((output - expected_output).abs().max() / expected_output.abs().max()),
        float((gradient - expected_gradient).norm() / expected_gradient.norm()),
    )


def _joined(results: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    gradients = [value.flatten() for name, value in results.items() if name != "output"]
    return results["output"].float(), torch.cat(gradients)
