"""The kernels on the CPU through Triton's interpreter. It must be on before triton is imported, so pytest runs this
file in a process of its own (test_interpreter.py); by hand: TRITON_INTERPRET=1 pytest <this file>.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from crystalformer.batch import CrystalBatch, PackedShells
from crystalformer.config import ModelConfig
from crystalformer.model import Crystalformer
from crystalformer.ops.triton import launch, refusal, rows
from crystalformer.ops.triton.tiles import Tiles, choose
from tests.crystalformer import golden
from tests.crystalformer.ops.triton import cases


@pytest.mark.parametrize("case", [*cases.CASES, cases.LARGE], ids=str)
def test_forward_and_every_gradient_match_the_oracle(case: cases.Case) -> None:
    errors = cases.worst_error(cases.kernels(case, "cpu"), cases.oracle(case))
    assert all(error < cases.tolerance(case) for error in errors.values()), errors


def test_two_runs_agree_bit_for_bit() -> None:
    case = cases.CASES[8]
    first, second = cases.kernels(case, "cpu"), cases.kernels(case, "cpu")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_each_atom_stops_at_its_own_reach() -> None:
    case = cases.CASES[1]
    batch, operands = cases.make_batch(case), cases.make_operands(case)
    shells = batch.shells(cases.CUTOFF_SIGMAS * case.scale / cases.RHO_MIN**0.5)
    q, k, v, rho = (operands[name].float() for name in ("q", "k", "v", "rho"))
    listed = rows.rows_of(shells)
    fields = (listed.start, listed.neighbor, listed.partner, listed.distance, listed.log_count)
    _, _, _, end = launch.moments(q, k, v, rho, *fields, case.scale, cases.CUTOFF_SIGMAS, 0, 1.0, 1.0)
    reach = cases.CUTOFF_SIGMAS * case.scale / rho.amin(1).sqrt()
    for atom in range(len(q)):
        first, last = int(shells.ptr[atom]), int(shells.ptr[atom + 1])
        near = int((shells.distance[first:last].float() <= reach[atom]).sum())
        assert int(end[atom] - listed.start[atom]) == -(-near // 16) * 16
    assert int((end.long() < listed.start[1:]).sum()) > 0


@pytest.mark.parametrize("height", [32, 64])
def test_other_tile_heights_give_the_same(height: int) -> None:
    case = next(case for case in cases.CASES if case.name == "padded")
    choose(replace(Tiles.fitting(case.heads, case.features, case.bases), rows=height))
    errors = cases.worst_error(cases.kernels(case, "cpu"), cases.oracle(case))
    assert all(error < cases.tolerance(case) for error in errors.values()), errors


def test_the_operator_passes_torchs_own_checks() -> None:
    case = cases.Case(name="checks", sizes=(2,), bases=16, scale=0.5)
    batch, operands = cases.make_batch(case), cases.make_operands(case)
    leaves = [operands[name].float().requires_grad_() for name in ("q", "k", "v", "rho")]
    listed = rows.rows_of(batch.shells(cases.CUTOFF_SIGMAS * case.scale / cases.RHO_MIN**0.5))
    fields = (listed.start, listed.neighbor, listed.partner, listed.distance, listed.log_count)
    torch.library.opcheck(
        launch.moments,
        (*leaves, *fields, case.scale, cases.CUTOFF_SIGMAS, case.bases, 0.3, 0.3),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_whole_model_agrees_with_the_torch_backend() -> None:
    config = ModelConfig(
        num_layers=2, model_dim=16, head_num=2, ff_dim=16, embedding_dim=(8,), value_pe_dist_real=16, scale_real=0.7
    )
    case = cases.Case(name="model", sizes=(2, 4))
    batch = cases.make_batch(case)
    batch = CrystalBatch.from_arrays(batch.positions, torch.tensor([1, 8, 3, 3, 26, 8]), batch.lattice, batch.sizes)
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = Crystalformer(config, backend=backend)
        output = model(batch)
        output.sum().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for found, expected in zip(*results, strict=True):
        assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


REAL = [name for name in golden.NAMES if golden.load(name).config.domain == "real"]

OWN_KERNELS = ("real_k0", "real_k16", "real_k32_scales", "headless_pe")
"""The vectors that differ in what the kernels compute; the others differ in rho, pooling or targets, around them."""


def golden_model(name: str) -> Crystalformer:
    """The float32 model of a vector, with tiles of 128 rows: in the interpreter a row costs as much as a tile."""
    vectors = golden.load(name)
    config = vectors.config
    choose(replace(Tiles.fitting(config.head_num, config.head_dim, config.value_pe_dist_real), rows=128))
    return vectors.model("triton", torch.float32)


@pytest.mark.parametrize("name", OWN_KERNELS)
def test_golden_output_and_every_gradient(name: str) -> None:
    vectors = golden.load(name)
    found = golden.run(golden_model(name), vectors.batch())
    assert golden.error(found.output, vectors.output) < 1e-5
    errors = golden.gradient_errors(found, vectors)
    assert all(error < 2e-5 for error in errors.values()), errors


@pytest.mark.parametrize("name", [name for name in REAL if name not in OWN_KERNELS])
def test_golden_output_of_the_other_real_vectors(name: str) -> None:
    vectors = golden.load(name)
    with torch.no_grad():
        output = golden_model(name).eval()(vectors.batch())
    assert golden.error(output.double().numpy(), vectors.output) < 1e-5


def test_torch_compile_takes_it_whole_and_with_other_sizes() -> None:
    torch._dynamo.reset()

    def run(
        q: torch.Tensor, rho: torch.Tensor, weight: torch.Tensor, shells: PackedShells, case: cases.Case
    ) -> torch.Tensor:
        return launch.attend(
            q, q, q, rho, shells, scale=case.scale, cutoff_sigmas=6.0, radial=cases.radial_of(case), weight=weight
        ).square()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    for sizes in [(2, 3), (4, 3)]:
        case = cases.Case(name="compile", sizes=sizes, scale=0.6)
        batch, operands = cases.make_batch(case), cases.make_operands(case)
        shells = batch.shells(cases.CUTOFF_SIGMAS * case.scale / math.sqrt(cases.RHO_MIN))
        rows.rows_of(shells)
        leaves = [operands[name].float().requires_grad_() for name in ("q", "rho", "weight")]
        found, expected = (function(*leaves, shells, case) for function in (compiled, run))
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(y.sum(), leaves) for y in (found, expected)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.fixture(autouse=True)
def _default_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crystalformer.ops.triton.tiles._CHOSEN", {})


def test_the_interpreter_is_on_and_takes_what_it_can() -> None:
    assert launch.INTERPRETED
    assert refusal(torch.device("cpu"), torch.float32, 8, 16, 64) is None
    assert "dtype must be one of" in str(refusal(torch.device("cpu"), torch.float64, 8, 16, 64))


def test_operands_that_do_not_fit_are_refused() -> None:
    case = cases.CASES[0]
    shells = cases.make_batch(case).shells(1.0)
    q = torch.zeros(1, 2, 4)
    rho = torch.ones(1, 2)
    with pytest.raises(ValueError, match="q, k and v must be alike"):
        launch.attend(q, q.bfloat16(), q, rho, shells, scale=1.0, cutoff_sigmas=6.0)
    with pytest.raises(ValueError, match="shells must cover 2 atoms, got 1"):
        two = q.expand(2, 2, 4)
        launch.attend(two, two, two, rho.expand(2, 2), shells, scale=1.0, cutoff_sigmas=6.0)


def test_an_address_off_the_16_byte_grid_gives_the_same() -> None:
    case = cases.CASES[1]
    batch, operands = cases.make_batch(case), cases.make_operands(case)
    shells = batch.shells(cases.CUTOFF_SIGMAS * case.scale / math.sqrt(cases.RHO_MIN))
    q, k, v, rho = (operands[name].float() for name in ("q", "k", "v", "rho"))
    shifted = torch.cat([torch.zeros(1), q.flatten()])[1:].view_as(q)
    assert shifted.data_ptr() % 16 != 0
    expected, found = (
        launch.attend(query, k, v, rho, shells, scale=case.scale, cutoff_sigmas=6.0) for query in (q, shifted)
    )
    assert torch.equal(found, expected)
