"""The kernels on a GPU against the float64 oracle: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from tests.crystalformer.ops.triton import cases  # noqa: E402 - after the check for triton

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", [*cases.CASES, cases.LARGE], ids=str)
def test_forward_and_every_gradient_match_the_oracle(case: cases.Case) -> None:
    errors = cases.worst_error(cases.kernels(case, "cuda"), cases.oracle(case))
    assert max(errors.values()) < cases.tolerance(case), errors


def test_two_runs_agree_bit_for_bit() -> None:
    case = cases.Case(name="repeat", sizes=(40, 7, 1), heads=8, features=16, bases=64)
    first, second = cases.kernels(case, "cuda"), cases.kernels(case, "cuda")
    assert all(torch.equal(first[name], second[name]) for name in first)
