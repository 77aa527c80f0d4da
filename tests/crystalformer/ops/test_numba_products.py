"""Products of small matrices in compiled code, and rho number by number."""

import numpy as np
import pytest
import torch
from numba import njit

from crystalformer.config import PositiveFunction
from crystalformer.ops.numba import rho
from crystalformer.ops.numba.products import (
    DEPTH,
    NEAR,
    add_product,
    matrix,
    pack,
    packed,
    packed_size,
    room_for,
    set_long_product,
    set_product,
    turned,
)
from crystalformer.positive import positive

SHAPES = [(1, 16, 1), (6, 64, 7), (7, 48, 31), (13, 80, 128), (29, 128, DEPTH + 3), (5, 208, 2 * DEPTH)]
LOWER = 0.3


@njit
def products(a, a_turned, b, before, shape):
    """The product as set, by the transpose of a, and added to what was there."""
    rows, columns, depth = shape
    plain, by_turned, added = np.empty_like(before), np.empty_like(before), before.copy()
    factor = matrix(b, 0, columns)
    set_product(matrix(a, 0, depth), factor, matrix(plain, 0, columns), shape)
    set_product(turned(a_turned, 0, rows), factor, matrix(by_turned, 0, columns), shape)
    add_product(matrix(a, 0, depth), factor, matrix(added, 0, columns), shape)
    return plain, by_turned, added


@njit
def packed_product(a, weight, shape, memory, at):
    rows, columns, depth = shape
    pack(weight, depth, 0, columns // 2, memory, at)
    pack(weight, depth, columns // 2, columns, memory, at)
    out = np.empty(rows * columns, np.float32)
    set_product(matrix(a, 0, depth), packed(memory, at, depth), matrix(out, 0, columns), shape)
    return out


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_the_sum_over_the_depth(shape):
    rows, columns, depth = shape
    a, b, before = numbers(1, rows, depth), numbers(2, depth, columns), numbers(3, rows, columns)
    expected = a.astype(np.float64) @ b.astype(np.float64)
    plain, by_turned, added = products(a.ravel(), a.T.ravel(), b.ravel(), before.ravel(), shape)
    close = {"rtol": 1e-4, "atol": 2e-6 * depth}
    np.testing.assert_allclose(plain.reshape(expected.shape), expected, **close)
    np.testing.assert_allclose(added.reshape(expected.shape), expected + before, **close)
    assert (by_turned == plain).all()


@pytest.mark.parametrize(("rows", "columns", "depth"), [(3, 16, 8), (24, 128, 128), (7, 144, 520)])
def test_a_packed_matrix_is_its_transpose(rows, columns, depth):
    a, weight = numbers(1, rows, depth), numbers(2, columns, depth)
    memory = np.full(40 + packed_size(columns, depth), np.nan, np.float32)
    found = packed_product(a.ravel(), weight.ravel(), (rows, columns, depth), memory, 40)
    plain, _, _ = products(a.ravel(), a.T.ravel(), weight.T.ravel(), found, (rows, columns, depth))
    assert (found == plain).all()
    assert np.isnan(memory[:40]).all()


def test_a_row_does_not_depend_on_those_beside_it():
    a, b = numbers(1, 11, 96), numbers(2, 96, 80)
    together, _, _ = products(a.ravel(), a.T.ravel(), b.ravel(), numbers(3, 11, 80).ravel(), (11, 80, 96))
    for row in range(11):
        alone, _, _ = products(a[row], a[row], b.ravel(), numbers(3, 80), (1, 80, 96))
        assert (alone == together[row * 80 : (row + 1) * 80]).all()


@pytest.mark.parametrize("text", ["elu=0.1", "elu", "abs", "exp=0.5", "softplus", "softplus=2", "sigmoid=0.7"])
def test_rho_and_its_slope_are_those_of_the_model(text):
    function = PositiveFunction.parse(text)
    own = rho.Rho(rho.FUNCTIONS.index(function.name), function.beta, LOWER)
    x = torch.cat([torch.linspace(-60, 60, 241), torch.linspace(-3, 3, 61)]).double().requires_grad_()
    value = positive(x, function, LOWER)
    slope = torch.autograd.grad(value.sum(), x)[0].numpy()
    found = np.array([rho.rho_of(number, own) for number in x.tolist()])
    np.testing.assert_allclose(found, value.detach().numpy(), rtol=1e-9)
    slopes = [rho.slope_of(number, one, own) for number, one in zip(x.tolist(), found, strict=True)]
    np.testing.assert_allclose(slopes, slope, rtol=1e-6, atol=1e-9)


@njit
def long_product(a, b, shape):
    rows, columns, depth = shape
    out, totals = np.empty(rows * columns, np.float32), np.empty(rows, np.float32)
    room = np.full(room_for(rows), np.nan, np.float32)
    factor, result = matrix(b, 0, columns), matrix(out, 0, columns)
    set_long_product(turned(a, 0, rows), factor, result, totals, shape, room)
    return out, totals


@pytest.mark.parametrize("shape", [(8, 16, 1), (16, 64, NEAR), (48, 80, 2 * NEAR + 5), (192, 128, 9 * NEAR - 3)])
def test_a_long_product_is_the_sum_over_the_depth(shape):
    rows, columns, depth = shape
    a, b = numbers(1, depth, rows), numbers(2, depth, columns)
    out, totals = long_product(a.ravel(), b.ravel(), shape)
    close = {"rtol": 1e-4, "atol": 2e-6 * depth}
    np.testing.assert_allclose(out.reshape(rows, columns), a.T.astype(np.float64) @ b.astype(np.float64), **close)
    np.testing.assert_allclose(totals, a.sum(axis=0, dtype=np.float64), **close)
