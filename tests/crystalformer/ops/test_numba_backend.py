"""The numba backend against the oracle in float64: every size of crystal, head and basis, every gradient, threads."""

import numpy as np
import pytest
import torch

from crystalformer.ops import RadialBasis, periodic_attention
from crystalformer.ops.numba import custom_op, launch, simd
from crystalformer.ops.numba import threads as threads_module
from crystalformer.ops.numba.lanes import from_lanes, to_lanes
from crystalformer.ops.numba.pairs import FAR
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal, supercell
from tests.crystalformer.ops.operands import RADIAL, attend, errors, operands

ROUNDING = 64 * torch.finfo(torch.float32).eps
"""8e-6 of a tensor's largest number, as the torch backend is held to."""


def check(batch, given, rounding: float = ROUNDING) -> None:
    """The kernels on float32 operands against the oracle on the same numbers in float64: output and every gradient.

    A gradient that cancels (dq of one atom a cell is 0) may be off by eight times what the oracle in float32 is.
    """
    single = given.to(torch.float32)
    exact = attend(batch, single.to(torch.float64), "reference")
    found, oracle = (errors(attend(batch, single, backend), exact) for backend in ("numba", "reference"))
    assert set(found) == {"y", "dq", "dk", "dv", "drho"} | ({"dweight"} if given.weight is not None else set())
    for name, value in found.items():
        assert value < max(rounding, 8 * oracle[name]), (name, found, oracle)


SIZES = {
    "one atom": [1],
    "three of one atom": [1, 1, 1],
    "7, 8 and 9 atoms": [7, 8, 9],
    "parts of W's gradient": [launch.PART - 1, 1, launch.PART, launch.PART + 1],
    "mixed": [1, 5, 40, 16, 3, 70, 17, 2, 8, 1],
}


@pytest.mark.parametrize("name", SIZES)
def test_output_and_every_gradient_of_any_crystals(name):
    batch = batch_of(*(random_crystal(n, seed=n + at, skew=0.25) for at, n in enumerate(SIZES[name])))
    check(batch, operands(batch, scale=0.5))


def test_output_and_every_gradient_of_a_large_crystal():
    batch = batch_of(random_crystal(200, seed=200, skew=0.1), *golden_crystals()[:2])
    few = RadialBasis(count=3, r_max=4.0, width=1.0)  # the oracle's memory
    check(batch, operands(batch, heads=1, features=2, radial=few, scale=0.35))


def pairs_in_reach(batch, given, cutoff_sigmas: float = 8.0) -> int:
    radius = cutoff_sigmas * given.scale / given.rho.min(dim=1).values.numpy() ** 0.5 * 0.999
    shells = batch.shells(float(radius.max()))
    query = np.repeat(np.arange(batch.num_atoms), np.diff(shells.ptr.numpy()))
    near = shells.distance.numpy() <= radius[query]
    return len(np.unique(query[near] * batch.num_atoms + shells.neighbor.numpy()[near]))


def test_output_and_every_gradient_where_the_pairs_leave_the_caches():
    batch = batch_of(supercell(random_crystal(40, seed=4), 4, 2, 2), random_crystal(7, seed=7)).unmerged(12.0)
    given = operands(batch, heads=64, features=2, radial=RadialBasis(count=3, r_max=4.0, width=1.0), scale=0.8)
    assert given.q.shape[1] // simd.LANES * pairs_in_reach(batch, given) > FAR
    exact = attend(batch, given.to(torch.float32).to(torch.float64), "torch")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(attend(batch, given.to(torch.float32), "numba"))
    finally:
        torch.set_num_threads(before)
    assert max(errors(found[0], exact).values()) < ROUNDING
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name


VARIANTS = {
    "the default model's": {"heads": 8, "features": 16, "radial": RadialBasis(count=64, r_max=14.0, width=14 / 64)},
    "K=0": {"radial": None},
    "one W for all heads": {"headed": False, "heads": 3},
    "one head of one feature": {"heads": 1, "features": 1},
    "16 heads": {"heads": 16, "features": 8},
    "12 heads": {"heads": 12, "features": 9},
    "one Gaussian": {"radial": RadialBasis(count=1, r_max=3.0, width=0.5)},
    "Gaussians beyond the cutoff": {"radial": RadialBasis(count=40, r_max=60.0, width=1.5)},
    "Gaussians before the neighbours": {"radial": RadialBasis(count=24, r_max=1.0, width=0.05)},
    "needles": {"radial": RadialBasis(count=32, r_max=6.0, width=0.02)},
    "Gaussians as wide as all of them": {"radial": RadialBasis(count=21, r_max=5.0, width=4.0)},
    "narrow": {"scale": 0.3},
    "wide": {"scale": 1.4},
    "low bound": {"rho_min": 0.2, "scale": 0.8},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient_of_any_variant(variant):
    batch = batch_of(*golden_crystals()[:2], random_crystal(1, seed=0), random_crystal(12, seed=1))
    check(batch, operands(batch, **{"scale": 0.6, **VARIANTS[variant]}))


def test_gaussians_of_very_different_widths():
    """One atom's head asks for the widest images, the others' end at the first: each stops where its own end."""
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=1.0)
    given.rho[:] = 200.0
    given.rho[3, 1] = 0.5
    given.rho[17, 0] = 5000.0
    check(batch, given)


def test_scores_of_any_size():
    """Exponents are taken relative to the largest: no overflow, and no weight where nothing is in reach."""
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=0.8)
    given.q[:] *= 60.0
    check(batch, given, 60 * ROUNDING)


def test_repeats_bit_for_bit_on_any_number_of_threads(monkeypatch):
    crystals = [*golden_crystals(), random_crystal(70, seed=0), random_crystal(300, seed=1)]
    batch = batch_of(*crystals)
    given = operands(batch, heads=9, scale=0.6).to(torch.float32)
    monkeypatch.setattr(threads_module, "SHELLS_A_THREAD", 100)
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for kept in (batch, batch_of(*crystals)):
                found[threads, kept is batch] = attend(kept, given, "numba", 6.0)
    finally:
        torch.set_num_threads(before)
    first = found.pop((1, True))
    for case, again in found.items():
        for name, value in first.items():
            assert torch.equal(again[name], value), (case, name)


def test_layers_of_other_scales_share_a_batch():
    """What one layer has made for the batch (pairs, features of shells) must serve the next, wider or narrower."""
    crystals = [*golden_crystals(), random_crystal(20, seed=1)]
    shared = batch_of(*crystals)
    other = RadialBasis(count=16, r_max=5.0, width=0.3)
    for scale, radial in ((0.5, RADIAL), (0.9, RADIAL), (0.5, None), (0.4, other), (0.9, RADIAL)):
        given = operands(shared, scale=scale, radial=radial).to(torch.float32)
        found, expected = attend(shared, given, "numba"), attend(batch_of(*crystals), given, "numba")
        for name, value in expected.items():
            assert torch.equal(found[name], value), (scale, name)


@pytest.mark.parametrize("threads", [1, 2])
def test_features_that_are_not_kept_are_the_same(monkeypatch, threads):
    batch = batch_of(*golden_crystals(), random_crystal(20, seed=1))
    given = operands(batch, scale=0.6).to(torch.float32)
    kept = attend(batch, given, "numba")
    monkeypatch.setattr(launch, "FEATURE_LIMIT", 0)
    monkeypatch.setattr(threads_module, "SHELLS_A_THREAD", 100)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made_again = attend(batch, given, "numba")
    finally:
        torch.set_num_threads(before)
    for name, value in kept.items():
        assert torch.equal(made_again[name], value), name


def test_gradients_only_of_what_asks_for_them():
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=0.5).to(torch.float32)
    v = given.v.clone().requires_grad_()
    settings = {"scale": 0.5, "rho_min": 0.5, "radial": given.radial, "weight": given.weight, "cutoff_sigmas": 8.0}
    y = periodic_attention(given.q, given.k, v, given.rho, batch, **settings)
    (y * given.dy).sum().backward()
    assert torch.equal(v.grad, attend(batch, given, "numba")["dv"])
    with torch.no_grad():
        assert torch.equal(periodic_attention(given.q, given.k, given.v, given.rho, batch, **settings), y)


def test_gradients_of_gradients_are_refused():
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=0.5).to(torch.float32)
    v = given.v.clone().requires_grad_()
    y = periodic_attention(
        given.q, given.k, v, given.rho, batch, scale=0.5, rho_min=0.5, radial=given.radial, weight=given.weight
    )
    (dv,) = torch.autograd.grad(y.square().sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dv.sum().backward()


def test_a_supercell_gives_each_copy_the_same():
    crystal = golden_crystals()[0]
    given = operands(batch_of(crystal), scale=0.8).to(torch.float32)
    repeated = type(given)(
        **{
            name: t.repeat(18, *[1] * (t.dim() - 1)) if isinstance(t, torch.Tensor) and name != "weight" else t
            for name, t in vars(given).items()
        }
    )
    alone = attend(batch_of(crystal), given, "numba")
    copies = attend(batch_of(supercell(crystal, 3, 3, 2)), repeated, "numba")
    for name in ("y", "dq", "drho"):
        expected = alone[name].repeat(18, *[1] * (alone[name].dim() - 1))
        torch.testing.assert_close(copies[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["q", "k", "v", "rho", "weight"])
def test_what_is_not_a_number_shows(name):
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=0.8).to(torch.float32)
    at = (0, 1) if name == "weight" else (1, 0)  # the first of two heads
    getattr(given, name)[at] = float("nan")
    result = attend(batch, given, "numba")
    assert bool(result["y"][:, 0].isnan().any())
    assert bool(result["y"][:, 1].isfinite().all())  # the other head's


def test_what_the_kernels_do_not_take_is_refused():
    batch = batch_of(*golden_crystals())
    with pytest.raises(ValueError, match="numba backend: dtype must be one of .*float32.*, got torch.float64"):
        attend(batch, operands(batch), "numba")
    reciprocal = operands(batch, radial=None, domain="reci").to(torch.float32)
    with pytest.raises(ValueError, match="the numba backend has no reciprocal domain"):
        attend(batch, reciprocal, "numba")
    assert "needs tensors on the CPU, got meta" in custom_op.refusal(torch.device("meta"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=0.6).to(dtype)
    found, exact = attend(batch, given, "numba"), attend(batch, given.to(torch.float64), "reference")
    assert all(value.dtype == dtype for value in found.values())
    assert all(error < 4 * torch.finfo(dtype).eps for error in errors(found, exact).values())


@pytest.mark.parametrize(("heads", "features"), [(8, 16), (16, 3), (3, 8), (9, 17), (1, 1), (8, 1)])
def test_lanes_hold_every_number_and_give_it_back(heads, features):
    values = np.arange(5 * heads * features, dtype=np.float32)
    groups = -(-heads // simd.LANES)
    lanes, back = np.full(groups * 5 * features * simd.LANES, -1.0, np.float32), np.empty_like(values)
    order = np.array([2, 0, 4, 1, 3])
    to_lanes(values, order, heads, features, 0, 5, lanes)
    split = lanes.reshape(groups, 5, features, simd.LANES).transpose(1, 0, 3, 2).reshape(5, -1, features)
    np.testing.assert_array_equal(split[:, :heads], values.reshape(5, heads, features)[order])
    from_lanes(lanes, order, heads, features, 0, 5, back)
    np.testing.assert_array_equal(back, values)


@simd.compiled
def exponentials(x, out):
    for at in range(0, len(x), simd.LANES):
        simd.store(out, at, simd.exp(simd.load(x, at)))


def test_exponentials_are_right_to_rounding():
    x = np.concatenate([np.linspace(-31.9999, 0.0, 80_000), [-33.0, -1e30, -np.inf, np.nan, 0, 0, 0, 0]]).astype(
        np.float32
    )
    out = np.empty_like(x)
    exponentials(x, out)
    exact = np.exp(x[:80_000].astype(np.float64))
    assert np.abs(out[:80_000] / exact - 1).max() < 2e-7
    np.testing.assert_allclose(out[80_000:], [0.0] * 3 + [np.nan] + [1.0] * 4, rtol=2e-7)


def test_functions_are_compiled_where_nothing_can_be_kept():
    """numba refuses to keep what has no file; a container without a writable folder is told the same."""
    made: dict[str, object] = {}
    exec("def twice(x):\n    return 2 * x", made)
    assert simd.compiled(made["twice"])(21) == 42
