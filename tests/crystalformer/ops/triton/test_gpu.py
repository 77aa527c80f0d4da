"""The kernels and the public operator on a GPU against the float64 oracle: ``pytest -m gpu``.

All but what is marked for a GPU alone also runs on the CPU, through Triton's interpreter (test_interpreter.py).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from crystalformer.ops import periodic_attention  # after the check for triton
from crystalformer.ops.triton import kernels
from tests.crystalformer.ops.operands import Operands, errors, operands
from tests.crystalformer.ops.triton import cases, device
from tests.crystalformer.ops.triton.device import DEVICE, auto_is_triton  # noqa: F401 - a fixture

pytestmark = device.MARKS

SIZES = (1, 5, 2) if device.INTERPRETED else (1, 5, 40, 16, 3, 70, 17, 2)

KERNELS = (kernels.forward_kernel, kernels.query_backward_kernel, kernels.key_backward_kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*cases.CASES, cases.LARGE], ids=str)
def test_forward_and_every_gradient_match_the_oracle(case: cases.Case) -> None:
    found = cases.worst_error(cases.kernels(case, "cuda"), cases.oracle(case))
    assert all(error < cases.tolerance(case) for error in found.values()), found


@pytest.mark.gpu
def test_two_runs_agree_bit_for_bit() -> None:
    case = cases.Case(name="repeat", sizes=(40, 7, 1), heads=8, features=16, bases=64)
    first, second = cases.kernels(case, "cuda"), cases.kernels(case, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
def test_batches_of_any_size_share_one_compilation() -> None:
    """A model that no other test has: the first batch compiles each kernel, the others find it compiled."""

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in KERNELS]

    def run(*sizes: int) -> None:
        case = cases.Case(name="count", sizes=sizes, heads=2, features=12, bases=48, scale=0.5)
        cases.kernels(case, "cuda")

    before = compiled()
    run(3, 5)
    first = compiled()
    assert first == [count + 1 for count in before]
    for sizes in [(1,), (1, 1), (16,), (2, 6, 8), (31, 4), (200,)]:
        run(*sizes)
    assert compiled() == first


REAL = {"scale": 0.6}
RECIPROCAL = {"radial": None, "scale": 2.2, "domain": "reci"}
OPERATOR = {"real": "crystalformer::triton_moments", "reci": "crystalformer::torch_reciprocal"}
"""What ``auto`` is on a GPU, and has a backward of its own."""


@pytest.mark.parametrize("domain", ["real", "reci"])
def test_auto_is_triton_in_real_space_and_matches_the_oracle(domain: str) -> None:
    batch = device.make_batch(SIZES)
    given = operands(batch, **(REAL if domain == "real" else RECIPROCAL))
    with device.Operators() as seen:
        found = device.attend(batch, given.to(torch.float32), "auto")
    assert seen.ours() == {OPERATOR[domain]: 1, OPERATOR[domain] + "_backward": 1}
    device.judge(batch, given)(found)


def test_auto_is_torch_for_float64() -> None:
    """To 1e-9 with a cutoff of 8 sigmas, as test_torch_backend.py has it on the CPU."""
    batch = device.make_batch(SIZES)
    given = operands(batch, **REAL)
    with device.Operators() as seen:
        found = device.attend(batch, given, "auto", cutoff_sigmas=8.0)
    assert seen.ours() == {"crystalformer::torch_attention": 1, "crystalformer::torch_attention_backward": 1}
    worst = errors(found, device.attend(batch, given, "reference", "cpu", 8.0))
    assert all(error < 1e-9 for error in worst.values()), worst


SETTINGS = [("real", "auto"), ("real", "torch"), ("reci", "torch")]


@pytest.mark.parametrize(("domain", "backend"), SETTINGS)
def test_products_stay_float32_where_the_program_allows_tf32(domain: str, backend: str) -> None:
    batch = device.make_batch(SIZES)
    settings = REAL if domain == "real" else RECIPROCAL
    if backend == "auto":  # Triton's product with W is a linear layer, and in TF32 like those
        settings = settings | {"radial": None}
    given = operands(batch, features=16, **settings)
    check = device.judge(batch, given)
    with device.matmul_precision("high"):
        found = device.attend(batch, given.to(torch.float32), backend)
    check(found)


@pytest.mark.gpu
@pytest.mark.skipif(torch.version.hip is not None, reason="TF32 is NVIDIA's")
def test_tf32_would_be_seen() -> None:
    """Else the test above could not fail: a product in TF32 is far beyond its limit."""
    left, right = torch.randn(256, 64, device=DEVICE), torch.randn(64, 256, device=DEVICE)
    exact = left.double() @ right.double()
    with device.matmul_precision("high"):
        error = (left @ right - exact).abs().max() / exact.abs().max()
    assert float(error) > 4 * device.ROUNDING


def turned(value: Tensor) -> Tensor:
    """The same numbers, in memory with the last axis first."""
    moved = value.movedim(-1, 0).contiguous().movedim(0, -1)
    assert not moved.clone().is_contiguous()
    return moved


def test_operands_in_another_order_in_memory() -> None:
    batch = device.make_batch(SIZES)
    given = operands(batch, **REAL)
    found = device.attend(batch, device.changed(given, turned).to(torch.float32), "auto")
    device.judge(batch, given)(found)


def leaves_of(given: Operands, wanted: set[str]) -> dict[str, Tensor]:
    """float32 operands on the device, of which ``wanted`` ask for gradients."""
    single = device.on(given.to(torch.float32), DEVICE)
    named = {name: getattr(single, name).clone() for name in ("q", "k", "v", "rho", "weight")}
    return {name: value.requires_grad_(name in wanted) for name, value in named.items()}


def run_auto(given: Operands, leaves: dict[str, Tensor]) -> Tensor:
    """y of leaves of ``given``, whose crystals are those of SIZES."""
    batch = device.make_batch(SIZES).to(DEVICE)
    q, k, v, rho, weight = (leaves[name] for name in ("q", "k", "v", "rho", "weight"))
    return periodic_attention(
        q, k, v, rho, batch, scale=given.scale, rho_min=given.rho_min, radial=given.radial, weight=weight
    )


def gradients(y: Tensor, leaves: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """By name, of those leaves that ask for them."""
    asking = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    return dict(zip(asking, torch.autograd.grad(y, list(asking.values()), dy), strict=True))


EVERY = {"q", "k", "v", "rho", "weight"}


def test_gradients_only_of_what_asks_for_them() -> None:
    given = operands(device.make_batch(SIZES), **REAL)
    dy, leaves = given.dy.to(DEVICE, torch.float32), leaves_of(given, EVERY)
    y = run_auto(given, leaves)
    expected = gradients(y, leaves, dy)
    assert set(expected) == EVERY
    for wanted in ({"q"}, {"k"}, {"v"}, {"rho"}, {"weight"}, {"k", "rho"}):
        leaves = leaves_of(given, wanted)
        again = run_auto(given, leaves)
        assert torch.equal(again, y)
        found = gradients(again, leaves, dy)
        assert set(found) == wanted
        assert all(torch.equal(value, expected[name]) for name, value in found.items()), wanted


def test_without_gradients_the_output_is_the_same() -> None:
    given = operands(device.make_batch(SIZES), **REAL)
    expected = run_auto(given, leaves_of(given, {"q"}))
    assert expected.requires_grad
    with torch.no_grad():
        assert torch.equal(run_auto(given, leaves_of(given, set())), expected)


def test_a_gradient_without_memory_of_its_own() -> None:
    """That of a sum is one number for all of y, with strides of 0."""
    given = operands(device.make_batch(SIZES), **REAL)
    leaves = leaves_of(given, EVERY)
    y = run_auto(given, leaves)
    one = y.new_ones(()).expand_as(y)
    assert not one.is_contiguous()
    found, expected = (gradients(run_auto(given, leaves), leaves, dy) for dy in (one, one.contiguous()))
    # On a GPU the product for the weight may be another kernel's where the rows lie in memory otherwise.
    assert all(error < device.ROUNDING for error in errors(found, expected).values())


@pytest.mark.gpu
def test_operands_on_a_gpu_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    batch = device.make_batch(SIZES)
    given = operands(batch, **REAL)
    check = device.judge(batch, given)
    assert torch.cuda.current_device() == 0
    check(device.attend(batch, given.to(torch.float32), "auto", "cuda:1"))
    assert torch.cuda.current_device() == 0
