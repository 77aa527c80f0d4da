"""Reduction: the atom counts of pymatgen, the distances of the crystal itself."""

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.crystal import read_crystals
from data_pipeline.formats.parse import from_pymatgen
from data_pipeline.sources.embedded import FOLDER
from data_pipeline.steps import reduce
from data_pipeline.steps.reduce import ReductionError, may_have_translation, primitive_cell
from data_pipeline.validate import structure_problem
from tests.data_pipeline.samples import caesium_chloride, crystal, mixed_rock_salt, rock_salt


def neighbour_distances(c, radius=6.0):
    """Sorted distances around every site, as a multiset of (species, species, distance) an atom of the cell."""
    from pymatgen.core import Structure

    s = Structure(c.lattice, np.maximum(c.atomic_numbers, 1), c.positions, coords_are_cartesian=True)
    centre, other, _, distance = s.get_neighbor_list(radius)
    kinds = list(zip(c.atomic_numbers[centre], c.atomic_numbers[other], np.round(distance, 3), strict=True))
    unique, counts = np.unique(np.array(kinds), axis=0, return_counts=True)
    return {tuple(k.tolist()): n / len(c.atomic_numbers) for k, n in zip(unique, counts, strict=True)}


def test_rock_salt_keeps_its_distances():
    small = primitive_cell(rock_salt())
    assert sorted(small.atomic_numbers) == [11, 17]
    assert np.linalg.det(small.lattice) == pytest.approx(5.64**3 / 4)
    assert neighbour_distances(small) == neighbour_distances(rock_salt())


def test_a_left_handed_lattice_is_the_same_crystal():
    for right in (rock_salt(), caesium_chloride(), mixed_rock_salt()):
        left = replace(right, lattice=right.lattice[[2, 1, 0]])
        assert np.linalg.det(left.lattice) < 0 and structure_problem(left) is None
        small = primitive_cell(left)
        assert np.linalg.det(small.lattice) > 0
        assert neighbour_distances(small) == neighbour_distances(right)
    skewed = crystal([[3, 0.1, 0], [0.2, 0, 5], [0.3, 4, 0.1]], [[0, 0, 0], [0.4, 0.5, 0.6]], [26, 8])
    turned = primitive_cell(skewed)
    assert np.linalg.det(skewed.lattice) < 0 < np.linalg.det(turned.lattice)
    assert np.array_equal(turned.positions, skewed.positions)
    assert neighbour_distances(turned) == neighbour_distances(skewed)


def test_mixed_sites_take_part():
    small = primitive_cell(mixed_rock_salt())
    assert sorted(small.atomic_numbers) == [0, 17]
    assert structure_problem(small) is None
    assert small.disorder.occupancy.tolist() == [0.5, 0.5]
    assert sorted(small.disorder.atomic_number) == [11, 19]


def test_another_mixture_on_one_site_breaks_the_translation():
    mixed = mixed_rock_salt()
    mixed.disorder.occupancy[:2] = [0.4, 0.6]
    assert primitive_cell(mixed) is mixed


def test_primitive_crystals_keep_their_own_arrays():
    for own in (caesium_chloride(), crystal(np.eye(3) * 3, [[0, 0, 0], [0.4, 0.5, 0.5]], [26, 26])):
        assert primitive_cell(own) is own


def test_the_filter_only_skips_what_the_search_would_leave_alone(monkeypatch):
    sample = read_crystals(pq.read_table(FOLDER / "elastic_tensor_2015.parquet").slice(0, 250))
    skipped = [c for c in sample if not may_have_translation(c.fractional(), c.atomic_numbers, c.lattice)]
    assert len(skipped) > 50
    monkeypatch.setattr(reduce, "may_have_translation", lambda *_: True)
    assert all(primitive_cell(c) is c for c in skipped)


@pytest.mark.parametrize("name", ["elastic_tensor_2015", "flla_2015", "dielectric_2017"])
def test_same_atom_counts_as_pymatgen(name):
    from pymatgen.core import Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    crystals = read_crystals(pq.read_table(FOLDER / f"{name}.parquet"))
    rows = np.random.default_rng(1).choice(len(crystals), 300, replace=False)
    pairs = [(crystals[i], primitive_cell(crystals[i])) for i in rows]
    smaller = [(c, small) for c, small in pairs if small is not c][:30]
    assert smaller
    for c, small in [*pairs[:40], *smaller]:
        s = Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True)
        assert len(small.atomic_numbers) == len(SpacegroupAnalyzer(s).find_primitive())
        assert structure_problem(small) is None
        own = Structure(small.lattice, small.atomic_numbers, small.positions, coords_are_cartesian=True)
        assert own.density == pytest.approx(s.density, rel=1e-9)


def test_same_prediction_as_for_the_published_cell_and_for_pymatgens():
    import torch
    from pymatgen.core import Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    from crystalformer import CrystalBatch, Crystalformer, ModelConfig

    crystals = read_crystals(pq.read_table(FOLDER / "elastic_tensor_2015.parquet").slice(0, 150))
    smaller = [(c, primitive_cell(c)) for c in crystals if len(c.atomic_numbers) <= 16]
    smaller = [(c, small) for c, small in smaller if small is not c][:8]
    assert len(smaller) == 8
    theirs = []
    for c, _ in smaller:
        s = SpacegroupAnalyzer(Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True))
        theirs.append(from_pymatgen(s.find_primitive()))
    torch.manual_seed(0)
    model = Crystalformer(ModelConfig(num_layers=2, model_dim=32, head_num=4, value_pe_dist_real=16)).double().eval()

    def predict(cells):
        batch = CrystalBatch.from_arrays(
            np.concatenate([c.positions for c in cells]),
            np.concatenate([c.atomic_numbers for c in cells]),
            np.array([c.lattice for c in cells]),
            np.array([len(c.atomic_numbers) for c in cells]),
        )
        with torch.no_grad():
            return model(batch)[:, 0].numpy()

    published = predict([c for c, _ in smaller])
    assert np.abs(predict([small for _, small in smaller]) - published).max() < 1e-4 * published.std()
    assert np.abs(predict(theirs) - published).max() < 1e-2 * published.std()


def test_failure_of_the_search_is_an_error():
    overlapping = crystal(np.eye(3) * 4, [[0, 0, 0], [0, 0, 0.001]], [1, 1])
    with pytest.raises(ReductionError, match="cell reduction failed"):
        primitive_cell(overlapping)
