"""The radial basis: its formula, and exponents that make no denormal numbers."""

import math

import numpy as np
import pytest
import torch

from crystalformer.ops import RadialBasis
from crystalformer.ops.radial import lowest_exponent, vanishing_exp_


def test_basis_is_gaussians_at_multiples_of_a_step():
    """b(d)_k = exp(-(d - mu_k)² / (2 w²)), mu_k = k r_max / K for k = 1..K: none at 0, the last at r_max."""
    radial = RadialBasis(count=5, r_max=10.0, width=1.5)
    distance = np.array([[0.0, 2.0], [3.7, 10.0], [11.3, 14.0]])
    found = radial(torch.from_numpy(distance))
    assert found.shape == (3, 2, 5)
    for (row, column), d in np.ndenumerate(distance):
        expected = [math.exp(-((d - 2.0 * k) ** 2) / (2 * 1.5**2)) for k in range(1, 6)]
        np.testing.assert_allclose(found[row, column].numpy(), expected, rtol=1e-13)
    np.testing.assert_allclose(radial.centers(found).numpy(), [2, 4, 6, 8, 10])


def test_distances_are_left_as_they_are():
    distance = torch.linspace(0, 12, 7, dtype=torch.float64)
    before = distance.clone()
    RadialBasis(count=4, r_max=8.0, width=1.0)(distance)
    assert torch.equal(distance, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_feature_nor_product_of_two_is_denormal(dtype):
    """Arithmetic on denormals is some fifty times slower; what is cut off is nothing beside a weight of 1."""
    features = RadialBasis(count=16, r_max=14.0, width=0.1)(torch.linspace(0, 16, 100_000, dtype=dtype))
    assert features.dtype == dtype
    smallest = features[features > 0].min()
    assert float(smallest) == pytest.approx(math.exp(lowest_exponent(dtype)), rel=0.2)
    assert float(smallest * smallest) > torch.finfo(dtype).tiny
    assert float(smallest) < 1e-6 * torch.finfo(dtype).eps
    assert float(features.min()) == 0.0


def test_what_is_not_a_number_stays_so():
    found = vanishing_exp_(torch.tensor([math.nan, -math.inf, -1e30, -32.0, 0.0]))
    assert found.isnan().tolist() == [True, False, False, False, False]
    assert found[1:].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_the_same_basis_is_the_same_key():
    first, second = (RadialBasis(count=16, r_max=14.0, width=0.875) for _ in range(2))
    assert {first: "features"}[second] == "features"
    assert first != RadialBasis(count=16, r_max=14.0, width=0.9)
