"""The oracle: the equations of model.md spelt out in loops, limits known in closed form, gradcheck."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from crystalformer.ops import RadialBasis
from crystalformer.ops.reference import attend_real, attend_reciprocal
from tests.crystalformer.crystals import Crystal, batch_of, golden_crystals, random_crystal
from tests.crystalformer.ops.operands import Operands, operands

TINY = RadialBasis(count=3, r_max=3.0, width=0.8)


def real(batch, given: Operands, **settings) -> torch.Tensor:
    return attend_real(
        given.q,
        given.k,
        given.v,
        given.rho,
        batch.positions,
        batch.lattice,
        batch.sizes.tolist(),
        scale=given.scale,
        rho_min=given.rho_min,
        radial=given.radial,
        weight=given.weight,
        **settings,
    )


def reciprocal(batch, given: Operands) -> torch.Tensor:
    return attend_reciprocal(
        given.q,
        given.k,
        given.v,
        given.rho,
        batch.positions,
        batch.lattice,
        batch.sizes.tolist(),
        scale=given.scale,
        rho_min=given.rho_min,
    )


def looped_real(crystal: Crystal, given: Operands, reach: int) -> np.ndarray:
    """model.md, section 1, one number after another, images -reach..reach."""
    q, k, v, rho = (t.numpy() for t in (given.q, given.k, given.v, given.rho))
    n, heads, features = q.shape
    y = np.zeros_like(q)
    for i, h in product(range(n), range(heads)):
        total = 0.0
        for j, cell in product(range(n), product(range(-reach, reach + 1), repeat=3)):
            d = np.linalg.norm(crystal.positions[j] + np.array(cell) @ crystal.lattice - crystal.positions[i])
            w = math.exp(q[i, h] @ k[j, h] / math.sqrt(features) - rho[i, h] * d**2 / (2 * given.scale**2))
            value = v[j, h].copy()
            if given.radial is not None:
                r, w_h = given.radial, given.weight.numpy()[h % len(given.weight)]
                centers = [(n + 1) * r.r_max / r.count for n in range(r.count)]
                value += w_h @ np.array([math.exp(-((d - mu) ** 2) / (2 * r.width**2)) for mu in centers])
            y[i, h] += w * value
            total += w
        y[i, h] /= total
    return y


def phi(crystal: Crystal, rho: float, scale: float, separation: np.ndarray, reach: int) -> float:
    """sum_m exp(-½ rho scale² |k_m|²) cos(k_m · separation)."""
    cells = np.stack(np.meshgrid(*[np.arange(-reach, reach + 1)] * 3), -1).reshape(-1, 3)
    waves = cells @ (2 * np.pi * np.linalg.inv(crystal.lattice).T)
    return float((np.exp(-0.5 * rho * scale**2 * (waves**2).sum(1)) * np.cos(waves @ separation)).sum())


def looped_reciprocal(crystal: Crystal, given: Operands, reach: int) -> tuple[np.ndarray, float]:
    """model.md, section 2, one pair after another; and the smallest Phi met."""
    q, k, v, rho = (t.numpy() for t in (given.q, given.k, given.v, given.rho))
    n, heads, features = q.shape
    y, smallest = np.zeros_like(q), math.inf
    for i, h in product(range(n), range(heads)):
        weights = []
        for j in range(n):
            value = phi(crystal, rho[i, h], given.scale, crystal.positions[j] - crystal.positions[i], reach)
            weights.append(math.exp(q[i, h] @ k[j, h] / math.sqrt(features)) * max(value, 1e-6))
            smallest = min(smallest, value)
        y[i, h] = np.array(weights) @ v[:, h] / sum(weights)
    return y, smallest


CASES = [(None, True), (TINY, True), (TINY, False)]
CASE_NAMES = ["K=0", "K=3", "K=3, one W for all heads"]


@pytest.mark.parametrize(("radial", "headed"), CASES, ids=CASE_NAMES)
def test_real_space_is_the_equation_in_loops(radial, headed):
    crystal = random_crystal(3, seed=1, volume=12.0)  # its atoms lie in and outside of the cell
    batch = batch_of(crystal)
    given = operands(batch, features=3, radial=radial, headed=headed, scale=0.6)
    expected = looped_real(crystal, given, reach=5)
    np.testing.assert_allclose(real(batch, given).numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("scale", "clamped"), [(1.2, False), (0.5, True)])
def test_reciprocal_space_is_the_equation_in_loops(scale, clamped):
    crystal = random_crystal(3, seed=2, volume=30.0)
    batch = batch_of(crystal)
    given = operands(batch, features=3, radial=None, scale=scale, domain="reci")
    expected, smallest = looped_reciprocal(crystal, given, 16)
    assert (smallest < 1e-6) == clamped
    np.testing.assert_allclose(reciprocal(batch, given).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_both_spaces_agree_by_poissons_sum():
    """sum_k exp(-½ s² k²) cos(k r) is sum_m exp(-|r + t_m|² / (2 s²)) but for a factor that cancels."""
    batch = batch_of(*golden_crystals())
    in_reciprocal = operands(batch, radial=None, scale=1.3, rho_min=0.4, domain="reci")
    in_real = Operands(
        q=in_reciprocal.q,
        k=in_reciprocal.k,
        v=in_reciprocal.v,
        rho=1 / in_reciprocal.rho,
        weight=None,
        dy=in_reciprocal.dy,
        scale=1.3,
        rho_min=1 / 1.6,
    )
    np.testing.assert_allclose(
        reciprocal(batch, in_reciprocal).numpy(), real(batch, in_real).numpy(), rtol=1e-9, atol=1e-11
    )


def test_an_atom_alone_with_itself_keeps_its_value():
    """Gaussians so narrow that only the image at distance 0 counts: y = v + W b(0)."""
    batch = batch_of(*golden_crystals())
    given = operands(batch, radial=TINY, rho_min=1.0)
    narrow = Operands(**{**vars(given), "rho": torch.full_like(given.rho, 1e5)})
    expected = given.v + torch.einsum("hdk,k->hd", given.weight, TINY(torch.zeros(1).double())[0])
    np.testing.assert_allclose(real(batch, narrow).numpy(), expected.numpy(), rtol=1e-13)


def test_one_atom_a_cell_has_one_value():
    """All its images carry the same v: y = v + W (mean of b), whatever q and k are."""
    batch = batch_of(Crystal(np.zeros((1, 3)), np.array([29]), 2.5 * np.eye(3)))
    given = operands(batch, radial=None)
    np.testing.assert_allclose(real(batch, given).numpy(), given.v.numpy(), rtol=1e-13)
    squares = np.array([sum(x * x for x in cell) for cell in product(range(-7, 8), repeat=3)]) * 2.5**2
    with_edges = operands(batch, radial=TINY, scale=0.9)
    features = TINY(torch.from_numpy(np.sqrt(squares))).numpy()
    for h in range(2):
        weights = np.exp(-float(with_edges.rho[0, h]) * squares / (2 * 0.9**2))
        mean = weights @ features / weights.sum()
        expected = with_edges.v[0, h].numpy() + with_edges.weight[h].numpy() @ mean
        np.testing.assert_allclose(real(batch, with_edges)[0, h].numpy(), expected, rtol=1e-12)


def test_the_automatic_box_is_converged_and_a_small_one_is_not():
    batch = batch_of(*golden_crystals())
    given = operands(batch, radial=TINY, scale=0.7)
    converged = real(batch, given)
    np.testing.assert_allclose(real(batch, given, box=5).numpy(), converged.numpy(), rtol=1e-11, atol=1e-12)
    assert float((real(batch, given, box=0) - converged).abs().max()) > 1e-3


def test_crystals_do_not_see_each_other():
    crystals = golden_crystals()
    batch = batch_of(*crystals)
    given = operands(batch, radial=TINY, scale=0.7)
    together, end = real(batch, given), 0
    for crystal in crystals:
        atoms = slice(end, end := end + len(crystal))
        alone = Operands(**{**vars(given), **{name: getattr(given, name)[atoms] for name in ("q", "k", "v", "rho")}})
        assert torch.equal(real(batch_of(crystal), alone), together[atoms])


@pytest.mark.parametrize(("radial", "headed"), CASES, ids=CASE_NAMES)
def test_gradients_of_real_space_are_finite_differences(radial, headed):
    batch = batch_of(random_crystal(2, seed=4), random_crystal(1, seed=5))
    given = operands(batch, features=2, radial=radial, headed=headed, scale=0.5)
    tensors = [t.requires_grad_() for t in (given.q, given.k, given.v, given.rho, given.weight) if t is not None]

    def run(q, k, v, rho, weight=None):
        return real(batch, Operands(**{**vars(given), "q": q, "k": k, "v": v, "rho": rho, "weight": weight}))

    assert torch.autograd.gradcheck(run, tensors, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("scale", "clamped"), [(1.2, False), (0.5, True)])
def test_gradients_of_reciprocal_space_are_finite_differences(scale, clamped):
    crystal = random_crystal(3, seed=2, volume=30.0)
    batch = batch_of(crystal, random_crystal(1, seed=7))
    given = operands(batch, features=2, radial=None, scale=scale, domain="reci")
    separations = [a - b for a in crystal.positions for b in crystal.positions]
    assert (min(phi(crystal, float(given.rho[:3].min()), scale, s, 16) for s in separations) < 1e-6) == clamped
    tensors = [t.requires_grad_() for t in (given.q, given.k, given.v, given.rho)]

    def run(q, k, v, rho):
        return reciprocal(batch, Operands(**{**vars(given), "q": q, "k": k, "v": v, "rho": rho}))

    assert torch.autograd.gradcheck(run, tensors, eps=1e-6, atol=1e-7, rtol=1e-5)
