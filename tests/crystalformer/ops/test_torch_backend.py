"""The torch backend against the oracle: every size of crystal and block, every gradient, both dtypes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from crystalformer.ops import RadialBasis, periodic_attention
from crystalformer.ops.blocks import QUERIES
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal, supercell
from tests.crystalformer.ops.operands import RADIAL, attend, errors, operands

FLOAT64_TOLERANCE = 1e-9
"""Both end at 8 sigma, each at its own images: exp(-32) = 1e-14 an image, some thousand images, times d² in drho.

Measured: 5e-10 in drho where widths differ most, else 1e-11.
"""

SIZES = {
    "one atom": [1],
    "three of one atom": [1, 1, 1],
    "15, 16 and 17 atoms": [15, 16, 17],
    "a block less one": [QUERIES - 1],
    "a block": [QUERIES],
    "a block and one": [QUERIES + 1],
    "blocks of one crystal each": [QUERIES - 1, 2, QUERIES, 1, QUERIES],
    "mixed": [1, 5, 40, 16, 3, 70, 17, 2, 8, 1],
}


def crystals_of(name: str) -> list:
    """Narrow Gaussians and dense cells keep the oracle, atoms² x images, small."""
    return [random_crystal(size, seed=size + place, skew=0.25) for place, size in enumerate(SIZES[name])]


@pytest.mark.parametrize("name", SIZES)
def test_output_and_every_gradient_of_any_size(name):
    batch = batch_of(*crystals_of(name))
    given = operands(batch, scale=0.5)
    found = errors(attend(batch, given, "torch"), attend(batch, given, "reference"))
    assert set(found) == {"y", "dq", "dk", "dv", "drho", "dweight"}
    assert all(error < FLOAT64_TOLERANCE for error in found.values()), found


@pytest.mark.parametrize("n", [200, 260])
def test_output_and_every_gradient_of_a_large_crystal(n):
    batch = batch_of(random_crystal(n, seed=n, skew=0.1), *golden_crystals()[:2])
    few = RadialBasis(count=3, r_max=4.0, width=1.0)  # the oracle's memory
    given = operands(batch, heads=1, features=2, radial=few, scale=0.35)
    found = errors(attend(batch, given, "torch"), attend(batch, given, "reference"))
    assert all(error < FLOAT64_TOLERANCE for error in found.values()), found


@pytest.mark.parametrize("cutoff_sigmas", [2.0, 4.0, 5.5, 6.0])
def test_what_a_crystal_gets_depends_on_no_other(cutoff_sigmas):
    """Blocks hold the shells of the farthest reaching atom: those that another has not reached must not count."""
    crystals = [random_crystal(size, seed=size, skew=0.25) for size in (1, 5, 40, 3, 17, 2)]
    given = operands(batch_of(*crystals), scale=0.8)
    together = attend(batch_of(*crystals), given, "torch", cutoff_sigmas)
    start = 0
    for crystal in crystals:
        batch = batch_of(crystal)
        part = slice(start, start + batch.num_atoms)
        own = {name: getattr(given, name)[part] for name in ("q", "k", "v", "rho", "dy")}
        alone = attend(batch, replace(given, **own), "torch", cutoff_sigmas)
        of_atoms = [name for name in alone if name != "dweight"]
        found = errors({name: together[name][part] for name in of_atoms}, {name: alone[name] for name in of_atoms})
        assert all(error < (1e-12 if cutoff_sigmas < 6 else 1e-7) for error in found.values()), found
        start += batch.num_atoms


@pytest.mark.parametrize("cutoff_sigmas", [2.0, 4.0, 6.0])
def test_it_ends_where_the_compiled_kernels_do(cutoff_sigmas):
    batch = batch_of(*(random_crystal(size, seed=size, skew=0.25) for size in (1, 5, 40, 3, 17, 2)))
    given = operands(batch, scale=0.8).to(torch.float32)
    found = errors(attend(batch, given, "torch", cutoff_sigmas), attend(batch, given, "numba", cutoff_sigmas))
    assert all(error < 2e-5 for error in found.values()), found


VARIANTS = {
    "K=0": {"radial": None},
    "one W for all heads": {"headed": False},
    "one head": {"heads": 1},
    "narrow": {"scale": 0.3},
    "wide": {"scale": 1.4},
    "low bound": {"rho_min": 0.2, "scale": 0.8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient_of_any_variant(variant):
    batch = batch_of(*golden_crystals(), random_crystal(1, seed=0), random_crystal(20, seed=1))
    given = operands(batch, **{"scale": 0.7, **VARIANTS[variant]})
    found = errors(attend(batch, given, "torch"), attend(batch, given, "reference"))
    assert all(error < FLOAT64_TOLERANCE for error in found.values()), found


def test_gaussians_of_very_different_widths():
    """One atom's head asks for the widest images, the others' end at the first: each stops where its own end."""
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=1.0)
    given.rho[:] = 200.0
    given.rho[3, 1] = 0.5
    given.rho[17, 0] = 5000.0
    found = errors(attend(batch, given, "torch"), attend(batch, given, "reference"))
    assert all(error < FLOAT64_TOLERANCE for error in found.values()), found


RECIPROCAL = {
    "golden": lambda: golden_crystals(),
    "one atom": lambda: [random_crystal(1, seed=3)],
    "mixed": lambda: [random_crystal(n, seed=n, skew=0.25) for n in (1, 9, 3, 30, 1, 8)],
}


@pytest.mark.parametrize("scale", [2.2, 0.6], ids=["wide", "clamped"])
@pytest.mark.parametrize("name", RECIPROCAL)
def test_reciprocal_output_and_every_gradient(name, scale):
    batch = batch_of(*RECIPROCAL[name]())
    given = operands(batch, radial=None, scale=scale, domain="reci")
    found = errors(attend(batch, given, "torch"), attend(batch, given, "reference"))
    assert all(error < FLOAT64_TOLERANCE for error in found.values()), found


@pytest.mark.parametrize("domain", ["real", "reci"])
@pytest.mark.parametrize("seed", range(3))
def test_float32_rounds_no_more_than_the_oracle(domain, seed):
    """Error against float64 within twice that of the oracle in float32, or 64 rounding errors (8e-6). Values as they
    are: dq of an atom whose keys are alike nearly cancels, and is judged beside the largest."""
    batch = batch_of(*(random_crystal(n, seed=seed + n) for n in (1, 6, 20, 66, 3)))
    settings = {"scale": 0.6} if domain == "real" else {"radial": None, "scale": 2.2}
    given = operands(batch, seed=seed, domain=domain, **settings)
    exact = attend(batch, given.to(torch.float32).to(torch.float64), "reference")
    single = given.to(torch.float32)
    oracle = errors(attend(batch, single, "reference"), exact)
    rounding = 64 * torch.finfo(torch.float32).eps
    for name, value in errors(attend(batch, single, "torch"), exact).items():
        assert value < max(2 * oracle[name], rounding), name


def test_padding_adds_nothing_to_float32_gradients():
    """Beside a dense crystal, a sparse one of the same block is mostly padding; alone it has next to none."""
    sparse, dense = random_crystal(2, seed=0, volume=400.0), random_crystal(8, seed=1, volume=6.0)
    both, alone = batch_of(sparse, dense), batch_of(sparse)
    given = operands(both, scale=1.0).to(torch.float32)
    given.rho[2:] = 0.5
    given.rho[:2] = 2.0
    padded = attend(both, given, "torch")
    cut = {name: t[:2] for name, t in vars(given).items() if name in ("q", "k", "v", "rho", "dy")}
    single = attend(alone, type(given)(**{**vars(given), **cut}), "torch")
    for name in ("y", "dq", "dk", "dv", "drho"):
        found, expected = padded[name][:2], single[name]
        assert float((found - expected).abs().max()) < 1e-6 * float(padded[name].abs().max()), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("domain", ["real", "reci"])
def test_repeats_bit_for_bit(domain, threads):
    crystals = [*golden_crystals(), random_crystal(70, seed=0)]
    if domain == "real":
        crystals.append(random_crystal(300, seed=1))
    batch = batch_of(*crystals)
    settings = {"radial": None, "scale": 2.2} if domain == "reci" else {"scale": 0.6}
    given = operands(batch, domain=domain, **settings).to(torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, again, fresh = (attend(b, given, "torch", 6.0) for b in (batch, batch, batch_of(*crystals)))
    finally:
        torch.set_num_threads(before)
    for name, value in first.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(fresh[name], value), name


def test_layers_of_other_scales_share_a_batch():
    """What one layer has made for the batch (lists, tables, features) must serve the next, wider or narrower."""
    crystals = [*golden_crystals(), random_crystal(20, seed=1), random_crystal(300, seed=2, skew=0.1)]
    shared = batch_of(*crystals)
    for scale, radial in ((0.5, RADIAL), (0.9, RADIAL), (0.5, None), (0.4, RADIAL), (0.9, None)):
        given = operands(shared, heads=1, scale=scale, radial=radial)
        found = errors(attend(shared, given, "torch"), attend(batch_of(*crystals), given, "torch"))
        assert all(error < FLOAT64_TOLERANCE for error in found.values()), (scale, found)


def test_backward_may_come_after_other_layers_forward():
    batch = batch_of(*golden_crystals(), random_crystal(20, seed=1))
    narrow, wide = operands(batch, scale=0.4, seed=1), operands(batch, scale=1.0, seed=2)
    expected = [attend(batch_of(*golden_crystals(), random_crystal(20, seed=1)), g, "torch") for g in (narrow, wide)]
    leaves = [[t.clone().requires_grad_() for t in (g.q, g.k, g.v, g.rho, g.weight)] for g in (narrow, wide)]
    outputs = [
        periodic_attention(
            *t[:4], batch, scale=g.scale, rho_min=g.rho_min, radial=g.radial, weight=t[4], cutoff_sigmas=8.0
        )
        for t, g in zip(leaves, (narrow, wide), strict=True)
    ]
    for y, t, g, result in zip(outputs, leaves, (narrow, wide), expected, strict=True):
        (y * g.dy).sum().backward()
        found = {name: leaf.grad for name, leaf in zip(("dq", "dk", "dv", "drho", "dweight"), t, strict=True)}
        result.pop("y")
        assert all(error < FLOAT64_TOLERANCE for error in errors(found, result).values())


def test_gradients_only_of_what_asks_for_them():
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=0.5)
    v = given.v.clone().requires_grad_()
    y = periodic_attention(
        given.q, given.k, v, given.rho, batch, scale=0.5, rho_min=0.5, radial=given.radial, weight=given.weight
    )
    (y * given.dy).sum().backward()
    expected = attend(batch, given, "torch", 6.0)["dv"]
    torch.testing.assert_close(v.grad, expected, rtol=1e-12, atol=1e-14)


def test_a_supercell_gives_each_copy_the_same():
    crystal = golden_crystals()[0]
    given = operands(batch_of(crystal), scale=0.8)
    large = supercell(crystal, 3, 3, 2)
    repeated = type(given)(
        **{
            name: t.repeat(18, *[1] * (t.dim() - 1)) if isinstance(t, torch.Tensor) and name != "weight" else t
            for name, t in vars(given).items()
        }
    )
    alone, copies = attend(batch_of(crystal), given, "torch"), attend(batch_of(large), repeated, "torch")
    for name in ("y", "dq", "drho"):
        torch.testing.assert_close(copies[name], alone[name].repeat(18, *[1] * (alone[name].dim() - 1)))
    torch.testing.assert_close(copies["dweight"], 18 * alone["dweight"])


def test_threads_may_use_one_batch():
    """Each with Gaussians of its own width, so that tables grow under one another."""
    crystals = [*golden_crystals(), *(random_crystal(20, seed=seed) for seed in range(8))]
    batch = batch_of(*crystals)
    rows = [operands(batch, scale=0.5 + 0.1 * width) for width in range(6)]
    alone = [attend(batch, given, "torch") for given in rows]
    batch = batch_of(*crystals)  # with nothing derived yet
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda given: attend(batch, given, "torch"), rows * 3))
    for found, expected in zip(together, alone * 3, strict=True):
        assert all(error < FLOAT64_TOLERANCE for error in errors(found, expected).values())
