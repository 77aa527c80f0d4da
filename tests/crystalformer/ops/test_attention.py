"""``periodic_attention``: what it refuses, which backend it takes, what its truncation costs."""

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from crystalformer.ops import RadialBasis, periodic_attention, prepare
from crystalformer.ops.attention import _announce, block_plan, reciprocal_plan
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal
from tests.crystalformer.ops.operands import RADIAL, attend, errors, operands


def call(batch, given, **changed):
    settings = {
        "q": given.q,
        "k": given.k,
        "v": given.v,
        "rho": given.rho,
        "scale": given.scale,
        "rho_min": given.rho_min,
        "radial": given.radial,
        "weight": given.weight,
        "domain": given.domain,
    }
    settings.update(changed)
    return periodic_attention(*(settings.pop(name) for name in ("q", "k", "v", "rho")), batch, **settings)


REFUSED = [
    ({"backend": "fast"}, "backend must be one of auto, torch, .*reference, got 'fast'"),
    ({"domain": "imaginary"}, "domain must be one of real, reci, got 'imaginary'"),
    ({"q": torch.zeros(7, 2, 4)}, "q must have a row for each of the 22 atoms, got 7"),
    ({"k": torch.zeros(22, 2, 5)}, r"k must have the shape \(22, 2, 4\), got \(22, 2, 5\)"),
    ({"v": torch.zeros(21, 2, 4)}, r"v must have the shape \(22, 2, 4\), got \(21, 2, 4\)"),
    ({"rho": torch.ones(22, 3)}, r"rho must have the shape \(22, 2\), got \(22, 3\)"),
    ({"weight": None}, "radial and weight must be given together"),
    ({"radial": None}, "radial and weight must be given together"),
    ({"weight": torch.zeros(2, 4, 8)}, r"weight must have the shape \(2 or 1, 4, 16\), got \(2, 4, 8\)"),
    ({"weight": torch.zeros(2, 8, 16)}, r"weight must have the shape \(2 or 1, 4, 16\), got \(2, 8, 16\)"),
    ({"weight": torch.zeros(3, 4, 16)}, r"weight must have the shape \(2 or 1, 4, 16\), got \(3, 4, 16\)"),
    ({"domain": "reci"}, "the reciprocal domain has no W b term"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_does_not_fit_is_refused(changed, message):
    batch = batch_of(*golden_crystals())
    with pytest.raises(ValueError, match=message):
        call(batch, operands(batch), **changed)


CHOSEN = [
    ("real", torch.float64, "torch"),
    ("reci", torch.float64, "torch"),
    ("reci", torch.float32, "torch"),
    ("real", torch.float32, "numba"),
    ("real", torch.bfloat16, "numba"),
]


@pytest.mark.parametrize(("domain", "dtype", "backend"), CHOSEN)
def test_auto_on_a_cpu_is_numba_for_what_it_takes_and_else_torch(domain, dtype, backend):
    batch = batch_of(*golden_crystals())
    given = operands(batch, domain=domain, radial=RADIAL if domain == "real" else None).to(dtype)
    default, chosen = call(batch, given), call(batch, given, backend=backend)
    assert torch.equal(default, chosen)
    assert torch.equal(call(batch, given, backend="auto"), chosen)
    if dtype != torch.bfloat16:
        assert not torch.equal(call(batch, given, backend="reference"), chosen)
        if backend == "numba":
            assert not torch.equal(call(batch, given, backend="torch"), chosen)


def test_without_numba_auto_is_torch_and_numba_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)  # as where it is not installed
    batch = batch_of(*golden_crystals())
    given = operands(batch).to(torch.float32)
    assert torch.equal(call(batch, given), call(batch, given, backend="torch"))
    with pytest.raises(ValueError, match="numba backend: numba is not installed"):
        call(batch, given, backend="numba")


def test_a_numba_that_cannot_be_loaded_is_done_without(tmp_path):
    """As where NumPy is newer than it knows: neighbours by NumPy, attention by torch, and the reason told."""
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')", encoding="utf-8")
    code = """
import logging
import torch
logging.basicConfig(level=logging.INFO)
from crystalformer import CrystalBatch, Crystalformer, ModelConfig
batch = CrystalBatch.from_arrays([[0.0, 0.0, 0.0], [1.5, 1.5, 1.5]], [11, 17], 3.0 * torch.eye(3)[None], [2])
assert Crystalformer(ModelConfig(num_layers=1)).eval()(batch).isfinite().all()
try:
    Crystalformer(ModelConfig(num_layers=1), backend="numba").eval()(batch)
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    why = "numba cannot be loaded (Numba needs NumPy 2.3 or less)"
    assert done.stdout == f"numba backend: {why}\n"
    assert f"neighbours are found by NumPy, several times slower than compiled: {why}" in done.stderr
    assert f"attention on cpu: torch (numba backend: {why})" in done.stderr


NOT_PREPARED = [
    ({"backend": "fast"}, torch.float32, "backend must be one of auto, .*, got 'fast'"),
    ({"domain": "imaginary"}, torch.float32, "domain must be one of real, reci, got 'imaginary'"),
    ({"backend": "numba", "domain": "reci"}, torch.float32, "the numba backend has no reciprocal domain"),
    ({"backend": "numba"}, torch.float64, "numba backend: dtype must be one of .*, got torch.float64"),
]


@pytest.mark.parametrize(("changed", "dtype", "message"), NOT_PREPARED)
def test_what_the_operator_refuses_is_not_prepared_either(changed, dtype, message):
    batch = batch_of(random_crystal(3, seed=0))
    with pytest.raises(ValueError, match=message):
        prepare(batch, torch.zeros(2, 4, dtype=dtype), **{"scale": 1.0, "rho_min": 0.5, **changed})
    with pytest.raises(ValueError, match=message):
        call(batch, operands(batch, radial=None).to(dtype), **changed)
    assert not batch.cache and not batch._shells


def test_a_gpu_that_does_without_its_kernels_says_so_aloud_and_once(caplog):
    gpu = torch.device("cuda", 63)  # named, not used
    with caplog.at_level(logging.INFO, "crystalformer"):
        for reason in ("head_dim must be 1 to 256, got 300", "head_dim must be 1 to 256, got 300", None):
            _announce("triton", gpu, reason)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "attention on cuda:63: torch (head_dim must be 1 to 256, got 300)"),
        ("INFO", "attention on cuda:63: triton"),
    ]


@pytest.mark.parametrize(("domain", "backend"), [("real", "torch"), ("real", "numba"), ("reci", "torch")])
def test_a_batch_met_in_inference_mode_can_be_trained_with(domain, backend):
    """What the batch keeps from an evaluation, and the batch itself, serve the backward of a later step."""
    with torch.inference_mode():
        batch = batch_of(*golden_crystals())
        given = operands(batch, domain=domain, radial=RADIAL if domain == "real" else None).to(torch.float32)
        call(batch, given, backend=backend)
    fresh = batch_of(*golden_crystals())
    given = operands(fresh, domain=domain, radial=given.radial).to(torch.float32)
    expected = attend(fresh, given, backend)
    found = attend(batch, given, backend)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture
def settings(monkeypatch) -> list[str]:
    """What float32 products were computed in, one for each that is made: few CPUs have any other way."""
    noted: list[str] = []

    def noting(product):
        def made(*arguments, **named):
            noted.append(torch.backends.mkldnn.matmul.fp32_precision)
            return product(*arguments, **named)

        return made

    for name in ("bmm", "einsum"):
        monkeypatch.setattr(torch, name, noting(getattr(torch, name)))
    return noted


@pytest.mark.parametrize("allowed", ["high", "medium"])
@pytest.mark.parametrize("domain", ["real", "reci"])
def test_products_of_fewer_bits_stay_outside(settings, domain, allowed):
    """What a program allows its own matrix products does not reach the exponents, and is as it was afterwards."""
    batch = batch_of(*golden_crystals())
    given = operands(batch, domain=domain, radial=RADIAL if domain == "real" else None).to(torch.float32)
    expected = attend(batch, given, "torch")
    torch.set_float32_matmul_precision(allowed)
    settings.clear()
    try:
        found = attend(batch, given, "torch")
        assert set(settings) == {"ieee"}
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("domain", ["real", "reci"])
def test_result_has_the_shape_and_dtype_of_q(backend, dtype, domain):
    batch = batch_of(*golden_crystals())
    given = operands(batch, heads=3, features=5, domain=domain, radial=RADIAL if domain == "real" else None)
    y = call(batch, given.to(dtype), backend=backend)
    assert (y.shape, y.dtype) == ((22, 3, 5), dtype)
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("domain", ["real", "reci"])
def test_truncation_error_falls_as_a_gaussian(domain):
    """At c sigma an image weighs exp(-c²/2); some hundred images weigh together. Each sigma more must pay."""
    batch = batch_of(*golden_crystals())
    given = operands(batch, domain=domain, radial=RADIAL if domain == "real" else None, scale=1.4)
    given = replace(given, rho=torch.full_like(given.rho, 0.5))  # the widest there is: the worst case
    exact = attend(batch, given, "reference")
    found = {c: errors(attend(batch, given, "torch", c), exact)["y"] for c in (3.0, 4.0, 5.0, 6.0, 7.0)}
    assert found[3.0] > 1e-5
    assert all(found[c + 1] < 0.1 * found[c] for c in (3.0, 4.0, 5.0, 6.0))
    assert found[6.0] < 1e-6
    assert found[7.0] < 1e-8


def test_narrow_gaussians_do_not_need_the_wide_ones_list():
    """Each atom ends at its own widths: with rho at 4 times the bound, half the radius gives the same numbers."""
    batch = batch_of(*golden_crystals())
    given = operands(batch, scale=1.0)
    narrow = replace(given, rho=torch.full_like(given.rho, 2.0))
    at_bound = replace(narrow, rho_min=2.0)
    found = errors(attend(batch, narrow, "torch", 6.0), attend(batch_of(*golden_crystals()), at_bound, "torch", 6.0))
    assert found["y"] < 1e-6
    assert all(error < 1e-5 for error in found.values())


def test_plans_are_made_once_a_batch_and_dtype():
    batch = batch_of(*golden_crystals())
    double, single = torch.zeros(1, dtype=torch.float64), torch.zeros(1)
    plan = block_plan(batch, 6.0, double)
    assert block_plan(batch, 6.0, double) is plan
    assert block_plan(batch, 5.0, double) is plan  # a smaller radius is served by the larger list
    assert block_plan(batch, 6.0, single) is not plan
    waves = reciprocal_plan(batch, 3.0, double)
    assert reciprocal_plan(batch, 3.0, double) is waves
    assert reciprocal_plan(batch, 3.0, single) is not waves
    assert reciprocal_plan(batch, 4.0, double) is not waves


def test_features_follow_the_basis_not_the_batch():
    """Two layers with other bases on one batch must not share radial features."""
    batch = batch_of(random_crystal(4, seed=0))
    other = RadialBasis(count=16, r_max=5.0, width=0.3)
    for radial in (RADIAL, other, RADIAL):
        given = operands(batch, radial=radial, scale=0.6)
        found = errors(attend(batch, given, "torch"), attend(batch, given, "reference"))
        assert all(error < 1e-9 for error in found.values())


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_weights_that_are_cut_off_have_no_gradient(backend):
    """Of a narrow head beside a wide one, every image but the atom itself weighs e^-(huge), times a huge distance."""
    batch = batch_of(*golden_crystals())
    given = operands(batch).to(torch.float32)
    rho = given.rho.clone()
    rho[:, 1] = 1e10
    given = replace(given, rho=rho)
    exact = attend(batch, given.to(torch.float64), "reference")
    found = attend(batch, given, backend)
    assert float((found["drho"][:, 1] * 1e10).abs().max()) < 1e-4
    others = {name: (found[name], exact[name]) for name in ("y", "dv", "dweight")}
    assert all(float((a - b).abs().max() / b.abs().max()) < 1e-5 for a, b in others.values())


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_programs_default_dtype_does_not_matter(default):
    batch = batch_of(*golden_crystals())
    given = operands(batch).to(torch.float32)
    expected = attend(batch, given, "numba")
    torch.set_default_dtype(default)
    try:
        found = attend(batch_of(*golden_crystals()), given, "numba")
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
