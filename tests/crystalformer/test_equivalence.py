"""Atoms that see the same crystal: found exactly, and computed once without a trace in outputs and gradients."""

import numpy as np
import pytest
import torch

from crystalformer import CrystalBatch, Crystalformer, ModelConfig, equivalence
from crystalformer.batch import Disorder
from crystalformer.equivalence import EQUIVALENT_GAP, Rows, by_numpy, distinct_atoms, kinds
from crystalformer.ops import periodic_attention
from tests.crystalformer import golden
from tests.crystalformer.crystals import Crystal, batch_of, embedded_crystals, golden_crystals, random_crystal

RADIUS = 9.0
SODIUM, CHLORINE = 11, 17


def rock_salt(a: float = 5.6) -> Crystal:
    """The conventional cell: four of each, all alike."""
    faces = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    positions = np.concatenate([faces, faces + [0.5, 0, 0]]) * a
    return Crystal(positions, np.repeat([SODIUM, CHLORINE], 4), np.eye(3) * a)


def stacked(layers: str, a: float = 3.0) -> Crystal:
    """Close-packed layers of one element; in ABAC every second atom sees other second neighbours than the rest."""
    height = a * np.sqrt(2 / 3)
    lattice = np.array([[a, 0, 0], [-a / 2, a * np.sqrt(3) / 2, 0], [0, 0, height * len(layers)]])
    places = {"A": (0, 0), "B": (1 / 3, 2 / 3), "C": (2 / 3, 1 / 3)}
    fractional = np.array([[*places[layer], i / len(layers)] for i, layer in enumerate(layers)])
    return Crystal(fractional @ lattice, np.full(len(layers), 57), lattice)


def distinct(*crystals: Crystal, radius: float = RADIUS) -> CrystalBatch:
    return batch_of(*crystals).distinct(radius)


@pytest.mark.parametrize(
    ("crystal", "multiplicity"),
    [
        (rock_salt(), [4, 4]),
        (stacked("AB"), [2]),
        (stacked("ABC"), [3]),
        (stacked("ABAC"), [2, 2]),
        (random_crystal(7, seed=3), [1] * 7),
        (random_crystal(1, seed=4), [1]),
    ],
)
def test_symmetric_crystals_have_few_distinct_atoms(crystal, multiplicity):
    found = distinct(crystal)
    assert found.multiplicity.tolist() == multiplicity
    assert found.sizes.tolist() == [len(multiplicity)]


def test_nearest_neighbours_alone_do_not_tell_the_stacking_apart():
    assert distinct(stacked("ABAC"), radius=4.5).multiplicity.tolist() == [4]
    assert distinct(stacked("ABAC"), radius=5.5).multiplicity.tolist() == [2, 2]


def test_the_first_atom_stands_for_its_class():
    crystals = [rock_salt(), random_crystal(3, seed=1), stacked("ABAC")]
    found = distinct(*crystals)
    whole = batch_of(*crystals)
    assert found.positions.tolist() == whole.positions[[0, 4, 8, 9, 10, 11, 12]].tolist()
    assert found.atomic_numbers.tolist() == whole.atomic_numbers[[0, 4, 8, 9, 10, 11, 12]].tolist()
    assert found.sizes.tolist() == [2, 3, 2]
    assert torch.equal(found.lattice, whole.lattice)


@pytest.mark.parametrize(("moved", "classes"), [(EQUIVALENT_GAP / 10, 2), (EQUIVALENT_GAP * 10, 8)])
def test_atoms_are_alike_up_to_the_gap(moved, classes):
    crystal = rock_salt()
    crystal.positions[:] += np.random.default_rng(0).uniform(-moved, moved, crystal.positions.shape) / 3
    assert distinct(crystal).num_atoms == classes


def test_shells_hold_every_image_of_the_whole_crystal():
    for crystal in (rock_salt(), stacked("ABAC"), *golden_crystals(), *embedded_crystals()[:3]):
        whole = batch_of(crystal)
        found, listed = whole.distinct(RADIUS), whole.shells(RADIUS)
        merged = found.shells(RADIUS)
        firsts = [whole.positions.tolist().index(place) for place in found.positions.tolist()]
        for atom, first in enumerate(firsts):
            mine, theirs = (slice(s.ptr[i], s.ptr[i + 1]) for s, i in ((merged, atom), (listed, first)))
            assert merged.count[mine].sum() == listed.count[theirs].sum()
            second_moment = [
                (s.count[rows] * s.distance[rows] ** 2).sum().item() for s, rows in ((merged, mine), (listed, theirs))
            ]
            assert second_moment[0] == pytest.approx(second_moment[1], rel=1e-4)
            assert (merged.distance[mine].diff() >= 0).all()


def test_the_relation_stays_symmetric():
    """(i, j, d) has its (j, i, d), of the same bits, and as many images in all."""
    found = distinct(rock_salt(), stacked("ABAC"), *golden_crystals(), *embedded_crystals()[:3])
    shells, times = found.shells(RADIUS), found.multiplicity
    atom = torch.repeat_interleave(torch.arange(found.num_atoms), shells.ptr.diff())
    there = zip(atom.tolist(), shells.neighbor.tolist(), shells.distance.tolist(), strict=True)
    back = zip(shells.neighbor.tolist(), atom.tolist(), shells.distance.tolist(), strict=True)
    images = (times[atom] * shells.count).tolist()
    assert dict(zip(there, images, strict=True)) == dict(zip(back, images, strict=True))


def test_a_supercell_is_its_primitive_cell():
    crystal = golden_crystals()[0]
    shifts = np.array([[i, j, 0] for i in range(2) for j in range(3)]) @ crystal.lattice
    large = Crystal(
        (crystal.positions + shifts[:, None]).reshape(-1, 3),
        np.tile(crystal.numbers, 6),
        crystal.lattice * np.array([[2], [3], [1]]),
    )
    small, merged = distinct(crystal), distinct(large)
    assert torch.equal(merged.multiplicity, 6 * small.multiplicity)
    mine, theirs = merged.shells(RADIUS), small.shells(RADIUS)
    assert torch.equal(mine.ptr, theirs.ptr)
    torch.testing.assert_close(mine.distance, theirs.distance, rtol=0, atol=1e-12)


def test_mixtures_are_alike_where_species_and_occupancies_are():
    numbers = np.array([SODIUM, 0, 0, 0, 0])
    site, number = np.array([1, 1, 2, 2, 3, 3, 4]), np.array([SODIUM, 19, 19, SODIUM, SODIUM, 19, SODIUM])
    occupancy = np.array([0.4, 0.6, 0.6, 0.4, 0.5, 0.5, 1.0])
    found = kinds(numbers, site, number, occupancy).tolist()
    assert found[0] == found[4] == SODIUM
    assert found[1] == found[2] != found[3]
    assert min(found[1:4]) > 98


def test_disordered_sites_take_part():
    crystal = rock_salt()
    whole = batch_of(crystal)
    mixed = [(a, z, part) for a in range(4) for z, part in ((SODIUM, 0.75), (19, 0.25 if a < 2 else 0.2))]
    atom, number, part = zip(*mixed, strict=True)
    disorder = Disorder(
        atom=torch.tensor(atom), atomic_number=torch.tensor(number), occupancy=torch.tensor(part).double()
    )
    numbers = [0] * 4 + [CHLORINE] * 4
    found = CrystalBatch.from_arrays(whole.positions, numbers, whole.lattice, whole.sizes, disorder).distinct(RADIUS)
    assert found.multiplicity.tolist() == [2, 2, 2, 2]  # the chlorines lie in the layer of one mixture or the other
    assert found.disorder.atom.tolist() == [0, 0, 1, 1]
    assert found.disorder.occupancy.tolist() == pytest.approx([0.75, 0.25, 0.75, 0.2])
    ordered = batch_of(crystal)
    assert ordered.distinct(RADIUS).disorder is None


@pytest.mark.parametrize("find", [distinct_atoms, by_numpy])
def test_atoms_whose_distances_join_one_way_only_are_left_apart(find):
    """Two atoms i see four j within a chain of gaps, one shell; every j sees the two i in two shells."""
    step = 0.9 * EQUIVALENT_GAP
    places = np.array([[0, 1, 2, 3], [2, 3, 0, 1]]) * step + 3.0
    far = places.T
    distance = np.concatenate([[0.0, *np.sort(row)] for row in [*places, *far]])
    neighbor = np.concatenate(
        [[i, *(2 + np.argsort(row, kind="stable"))] for i, row in enumerate(places)]
        + [[2 + j, *np.argsort(row, kind="stable")] for j, row in enumerate(far)]
    )
    ptr = np.array([0, 5, 10, 13, 16, 19, 22])
    sizes, alike = np.array([6, 1]), np.array([1, 1, 2, 2, 2, 2, 1])
    rows = Rows(np.append(ptr, 23), np.append(neighbor, 6), np.append(distance, 0.0), np.ones(23, dtype=np.int64))
    found = find(sizes, alike, rows)
    assert found.sizes.tolist() == [6, 1]
    assert found.multiplicity.tolist() == [1] * 7
    assert found.rows.neighbor.tolist() == rows.neighbor.tolist()
    np.testing.assert_array_equal(found.rows.distance, rows.distance)


def test_numpy_finds_what_the_compiled_code_finds():
    """But for the order of shells whose distances differ by rounding."""
    crystals = (rock_salt(), stacked("ABAC"), random_crystal(9, seed=2), *golden_crystals(), *embedded_crystals())
    batch = batch_of(*crystals)
    given = batch.sizes.numpy(), batch.atomic_numbers.numpy(), batch.shells(RADIUS).rows
    mine, theirs = distinct_atoms(*given), by_numpy(*given)
    assert mine.sizes.sum() < 0.6 * batch.num_atoms
    for a, b in zip(mine[:3], theirs[:3], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(mine.rows.ptr, theirs.rows.ptr)
    listed = []
    for rows in (mine.rows, theirs.rows):
        atom = np.repeat(np.arange(len(rows.ptr) - 1), np.diff(rows.ptr))
        order = np.lexsort((rows.distance, rows.neighbor, atom))
        listed.append((rows.neighbor[order], rows.images[order], rows.distance[order]))
    np.testing.assert_array_equal(listed[0][0], listed[1][0])
    np.testing.assert_array_equal(listed[0][1], listed[1][1])
    np.testing.assert_allclose(listed[0][2], listed[1][2], rtol=1e-13)


def test_without_numba_numpy_finds_them(monkeypatch):
    expected = distinct(*golden_crystals())
    monkeypatch.setattr(equivalence, "_compiled", lambda: None)
    found = distinct(*golden_crystals())
    assert torch.equal(found.multiplicity, expected.multiplicity)
    assert torch.equal(found.positions, expected.positions)


# What the model makes of it -------------------------------------------------------------------------------------


CRYSTALS = (rock_salt(), stacked("ABAC"), *golden_crystals(), *(c for c in embedded_crystals() if len(c) < 50))


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"), [("torch", torch.float64, 1e-9), ("numba", torch.float32, 2e-5)]
)
def test_outputs_and_gradients_are_those_of_all_atoms(backend, dtype, tolerance):
    """Measured: 8e-14 and 2e-6, at 8 sigma, where truncation does not count."""
    vectors = golden.load("real_k16")
    radius = vectors.model(cutoff_sigmas=8.0).config.neighbor_radius
    merged, whole = batch_of(*CRYSTALS), batch_of(*CRYSTALS).unmerged(radius)
    assert merged.distinct(radius).num_atoms < 0.6 * whole.num_atoms
    found, expected = (golden.run(vectors.model(backend, dtype, cutoff_sigmas=8.0), b) for b in (merged, whole))
    assert golden.error(found.output, expected.output) < tolerance
    for key in vectors.gradients:
        assert golden.error(found.gradients[key], expected.gradients[key]) < tolerance, key


def test_the_oracle_sees_all_atoms():
    model = golden.load("real_k16").model("reference")
    seen = []
    model.blocks[0].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    batch = batch_of(*golden_crystals())
    model(batch)
    assert seen == [batch.num_atoms]


@pytest.mark.parametrize(
    "settings",
    [
        {"domain": "multihead"},
        {"domain": "real-reci"},
        {"domain": "reci"},
        {"pooling": "max"},
        {"pre_pooling_op": "w+bn+relu", "norm_type": "bn"},
    ],
)
def test_models_for_which_alike_is_not_the_same_keep_all_atoms(settings):
    config = ModelConfig(num_layers=2, model_dim=16, head_num=2, ff_dim=8, **settings)
    assert not config.neighborhood.distinct
    model = Crystalformer(config).eval()
    seen = []
    model.blocks[0].register_forward_hook(lambda _module, inputs, _output: seen.append(len(inputs[0])))
    model(batch_of(rock_salt()))
    assert seen == [8]
    with pytest.raises(ValueError, match="all atoms of its crystals"):
        model(batch_of(rock_salt()).distinct(20.0))


@pytest.mark.parametrize("settings", [{"domain": "reci"}, {"backend": "reference"}])
def test_the_operator_refuses_distinct_atoms_where_the_others_are_missed(settings):
    batch = distinct(rock_salt())
    q = torch.ones(2, 2, 4)
    with pytest.raises(ValueError, match="all atoms of its crystals here"):
        periodic_attention(q, q, q, torch.ones(2, 2), batch, scale=0.5, rho_min=0.5, **settings)
    assert periodic_attention(q, q, q, torch.ones(2, 2), batch, scale=0.5, rho_min=0.5).shape == q.shape


def test_a_batch_of_distinct_atoms_is_no_whole_crystal():
    found = distinct(rock_salt())
    assert found.distinct(3.0) is found
    with pytest.raises(ValueError, match="within 12 Å cannot be found"):
        found.shells(12.0)
    with pytest.raises(ValueError, match="does not hold the others"):
        found.unmerged(RADIUS)
