"""CrystalBatch: packing, what is refused, disorder, shell lists shared by everyone who asks."""

import copy
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from crystalformer import CrystalBatch, Crystalformer, Disorder, ModelConfig
from crystalformer.batch import PackedShells
from crystalformer.neighbors import find_shells
from tests.crystalformer.crystals import batch_of, golden_crystals, golden_structures, random_crystal

TWO = {
    "positions": [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.5, 0.0, 0.0]],
    "atomic_numbers": [11, 17, 29],
    "lattice": np.stack([4 * np.eye(3), 3 * np.eye(3)]),
    "sizes": [2, 1],
}
"""Two crystals of 2 and 1 atoms."""


def disorder(atom=(1, 1), atomic_number=(17, 35), occupancy=(0.75, 0.25)) -> Disorder:
    return Disorder(
        atom=torch.tensor(atom, dtype=torch.int64),
        atomic_number=torch.tensor(atomic_number, dtype=torch.int64),
        occupancy=torch.tensor(occupancy, dtype=torch.float64),
    )


def test_arrays_become_tensors_of_the_documented_types():
    batch = CrystalBatch.from_arrays(**TWO)
    assert (batch.num_crystals, batch.num_atoms) == (2, 3)
    assert batch.positions.dtype == batch.lattice.dtype == torch.float64
    assert batch.atomic_numbers.dtype == batch.sizes.dtype == torch.int64
    assert batch.crystal.tolist() == [0, 0, 1]


REFUSED = [
    ({"positions": [[0.0, 0.0, 0.0]]}, r"positions must have the shape \(3, 3\), got \(1, 3\)"),
    ({"atomic_numbers": [[11, 17, 29]]}, r"atomic_numbers must have the shape \(3,\), got \(1, 3\)"),
    ({"lattice": np.eye(3)}, r"lattice must have the shape \(2, 3, 3\), got \(3, 3\)"),
    ({"sizes": [[2, 1]]}, r"sizes must have the shape \(2,\), got \(1, 2\)"),
    ({"atomic_numbers": 11, "sizes": [1]}, r"atomic_numbers must have the shape \(1,\), got \(\)"),
    ({"sizes": [2, 2]}, r"sizes must be at least 1 each and sum to the 3 atoms, got \[2, 2\]"),
    ({"sizes": [3, 0]}, r"sizes must be at least 1 each and sum to the 3 atoms, got \[3, 0\]"),
    ({"sizes": [4, -1]}, r"sizes must be at least 1 each and sum to the 3 atoms, got \[4, -1\]"),
    ({"positions": [[0, 0, 0], [1, 1, np.nan], [0, 0, 0]]}, "positions must be finite numbers"),
    ({"lattice": np.full((2, 3, 3), np.inf)}, "lattice must be finite numbers"),
    ({"atomic_numbers": [11.9, 17, 29]}, r"atomic_numbers must be whole numbers, got \[11.9, 17.0, 29.0\]"),
    ({"sizes": [1.5, 1.5]}, r"sizes must be whole numbers, got \[1.5, 1.5\]"),
    ({"atomic_numbers": [11, 0, 29]}, r"atomic_numbers must be between 1 and 98 \(H to Cf\), got 0 to 29"),
    ({"atomic_numbers": [11, 99, 29]}, r"atomic_numbers must be between 1 and 98 \(H to Cf\), got 11 to 99"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSED)
def test_what_does_not_fit_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        CrystalBatch.from_arrays(**{**TWO, **changed})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_may_change_once_the_batch_is_made(dtype):
    positions, numbers, lattice = np.zeros((1, 3), dtype), np.ones(1, np.int64), np.eye(3, dtype=dtype)[None]
    batch = CrystalBatch.from_arrays(positions, numbers, lattice, np.ones(1, np.int64))
    for array in (positions, numbers, lattice):
        array += 7
    assert batch.positions.sum() == 0 and batch.atomic_numbers.item() == 1 and batch.lattice.sum() == 3
    lattice.flags.writeable = False  # as pymatgen's are: torch warns of such
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CrystalBatch.from_arrays(positions, numbers, lattice, np.ones(1, np.int64))


def test_no_crystal_is_refused():
    with pytest.raises(ValueError, match=r"sizes must be at least 1 each and sum to the 0 atoms, got \[\]"):
        CrystalBatch.from_arrays(np.zeros((0, 3)), [], np.zeros((0, 3, 3)), [])
    with pytest.raises(ValueError, match="structures must hold at least one crystal"):
        CrystalBatch.from_structures([])


REFUSED_DISORDER = [
    ({"atomic_numbers": [11, -1, 29]}, disorder(), "atomic_numbers must be between 0 and 98"),
    ({}, disorder((), (), ()), "disorder.atom must hold indices of the 3 atoms"),
    ({}, disorder((1, 3)), "disorder.atom must hold indices of the 3 atoms"),
    ({}, disorder((-2, 1)), "disorder.atom must hold indices of the 3 atoms"),
    ({}, disorder(atomic_number=(0, 17)), "disorder.atomic_number must be between 1 and 98"),
    ({}, disorder(atomic_number=(17, 99)), "disorder.atomic_number must be between 1 and 98"),
    ({}, disorder(atomic_number=(17,)), "three lists of one length, got the shapes"),
    ({}, disorder(occupancy=((0.75, 0.25),)), "three lists of one length, got the shapes"),
    (
        {},
        disorder(occupancy=(1.0, 0.0)),
        r"disorder.occupancy must be greater than 0 and at most 1, got \[1.0, 0.0\]",
    ),
    ({}, disorder(occupancy=(0.5, 1.5)), "disorder.occupancy must be greater than 0 and at most 1"),
    ({}, disorder(occupancy=(0.5, float("nan"))), "disorder.occupancy must be greater than 0 and at most 1"),
    ({}, disorder((1, 2)), "exactly the atoms whose atomic number is 0"),
    ({"atomic_numbers": [0, 0, 29]}, disorder((1, 1)), "exactly the atoms whose atomic number is 0"),
]


@pytest.mark.parametrize(("changed", "species", "message"), REFUSED_DISORDER)
def test_disorder_that_does_not_fit_is_refused(changed, species, message):
    with pytest.raises(ValueError, match=message):
        CrystalBatch.from_arrays(**{**TWO, "atomic_numbers": [11, 0, 29], **changed}, disorder=species)


def test_structures_and_arrays_give_the_same_batch():
    found, expected = CrystalBatch.from_structures(golden_structures()), batch_of(*golden_crystals())
    assert torch.equal(found.atomic_numbers, expected.atomic_numbers)
    assert torch.equal(found.sizes, expected.sizes)
    assert torch.equal(found.lattice, expected.lattice)
    torch.testing.assert_close(found.positions, expected.positions, rtol=0, atol=1e-12)  # through fractional ones
    assert found.disorder is None


def test_any_iterable_of_structures_will_do():
    batch = CrystalBatch.from_structures(structure for structure in golden_structures())
    assert batch.sizes.tolist() == [8, 6, 2, 4, 2]


def test_disordered_structures_list_their_species():
    from pymatgen.core import Lattice, Structure

    first = Structure(Lattice.cubic(4), ["Cu", "Na"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    species = ["Cu", {"Zn": 0.25, "Mg": 0.75}, {"O2-": 0.5}]  # an alloy, a half-empty site with an oxidation state
    second = Structure(Lattice.cubic(5), species, [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0, 0]])
    batch = CrystalBatch.from_structures([first, second])
    assert batch.atomic_numbers.tolist() == [29, 11, 29, 0, 0]
    rows = zip(*(getattr(batch.disorder, n).tolist() for n in ("atom", "atomic_number", "occupancy")), strict=True)
    assert sorted(rows) == [(3, 12, 0.75), (3, 30, 0.25), (4, 8, 0.5)]


def test_packed_shells_are_those_of_each_crystal():
    crystals = [random_crystal(n, seed=n) for n in (3, 1, 4)]
    packed = batch_of(*crystals).shells(6.0)
    start = 0
    for crystal in crystals:
        alone = find_shells(crystal.positions, crystal.lattice, 6.0)
        end = start + len(crystal)
        rows = slice(int(packed.ptr[start]), int(packed.ptr[end]))
        np.testing.assert_array_equal(packed.neighbor[rows].numpy(), alone.neighbor + start)
        np.testing.assert_array_equal(packed.distance[rows].numpy(), alone.distance)
        np.testing.assert_array_equal(packed.count[rows].numpy(), alone.count)
        np.testing.assert_array_equal(packed.ptr[start : end + 1].numpy() - rows.start, alone.ptr)
        start = end
    assert int(packed.ptr[-1]) == len(packed.distance)
    assert packed.radius == 6.0


def test_shells_are_found_once_and_a_larger_radius_serves_a_smaller_one():
    batch = batch_of(*golden_crystals())
    wide = batch.shells(7.0)
    assert batch.shells(7.0) is wide
    assert batch.shells(5.0) is wide
    assert batch.shells(8.0).radius == 8.0
    assert batch.shells(5.0) is wide  # the narrowest that is wide enough


def test_attached_shells_are_used():
    crystals = golden_crystals()
    sizes = [len(c) for c in crystals]
    found = [find_shells(c.positions, c.lattice, 6.0) for c in crystals]
    packed = PackedShells.pack(found, sizes, 6.0)
    batch = batch_of(*crystals)
    batch.attach_shells(packed)
    assert batch.shells(6.0) is packed
    assert torch.equal(packed.distance, batch_of(*crystals).shells(6.0).distance)


def test_shells_of_other_atoms_are_refused():
    with pytest.raises(ValueError, match="shells must cover 22 atoms, got 3"):
        batch_of(*golden_crystals()).attach_shells(batch_of(random_crystal(3, 0)).shells(3.0))


def test_moving_a_batch_takes_disorder_and_shells_along_but_no_cache():
    batch = CrystalBatch.from_arrays(**{**TWO, "atomic_numbers": [11, 0, 29]}, disorder=disorder())
    batch.shells(5.0).cache["plan"] = "of the old device"
    assert batch.to("cpu") is batch
    with torch.inference_mode():
        on_meta = batch.to("meta")
    assert not on_meta.positions.is_inference() and not on_meta.shells(5.0).distance.is_inference()
    assert on_meta.shells(5.0).cache == {}
    tensors = [on_meta.positions, on_meta.atomic_numbers, on_meta.lattice, on_meta.sizes, on_meta.shells(5.0).count]
    assert {t.device.type for t in [*tensors, on_meta.disorder.atom]} == {"meta"}
    assert on_meta.device.type == "meta"


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch))])
def test_a_copy_knows_no_plan_of_another_process(how, backend):
    """Plans go by numbers of this process: elsewhere the same number is another batch's plan."""
    model = Crystalformer(ModelConfig(num_layers=1), backend=backend).eval()
    batch = CrystalBatch.from_arrays([[0.0, 0, 0], [1.4, 1.4, 1.4]], [11, 17], [2.8 * np.eye(3)], [2])
    with torch.no_grad():
        expected = model(batch)
        copied = how(batch)
        lists = [shells for one in copied._distinct.values() for shells in one._shells.values()]
        assert not any(shells.cache for shells in lists) and lists
        del batch
        assert torch.equal(model(copied), expected)


def test_a_changed_batch_finds_its_neighbours_anew():
    model = Crystalformer(ModelConfig(num_layers=1)).eval()
    batch = CrystalBatch.from_arrays([[0.0, 0, 0], [1.4, 1.4, 1.4]], [11, 17], [2.8 * np.eye(3)], [2])
    with torch.no_grad():
        model(batch)
        scaled = {"positions": batch.positions * 1.5, "lattice": batch.lattice * 1.5}
        fresh = CrystalBatch.from_arrays(batch.positions * 1.5, [11, 17], batch.lattice * 1.5, [2])
        assert torch.equal(model(replace(batch, **scaled)), model(fresh))
