"""find_shells holds exactly the images within the radius: against brute force, pymatgen and known lattices."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from crystalformer import neighbors
from crystalformer.neighbors import SHELL_GAP, find_shells
from tests.crystalformer.crystals import (
    REWRITTEN,
    Crystal,
    embedded_crystals,
    golden_crystals,
    heights,
    random_crystal,
    supercell,
)


@pytest.fixture(autouse=True, params=["compiled", "NumPy", "cells"])
def search(request, monkeypatch):
    """Every test goes by the compiled search, by the one without numba, and by that of crystals of many atoms."""
    assert neighbors._compiled_search() is not None
    if request.param == "NumPy":
        monkeypatch.setattr(neighbors, "_compiled_search", lambda: None)
    if request.param == "cells":
        monkeypatch.setattr(neighbors, "_DENSE_LIMIT", 0)


CUBIC = Crystal(np.zeros((1, 3)), np.array([29]), np.eye(3))
FACE_CENTRED = Crystal(np.zeros((1, 3)), np.array([29]), (1 - np.eye(3)) / np.sqrt(2))  # nearest neighbours at 1 Å


def images(shells) -> dict[tuple[int, int], np.ndarray]:
    """(i, j) -> sorted distances, one an image."""
    atoms = np.repeat(np.arange(len(shells.ptr) - 1), np.diff(shells.ptr))
    found: dict[tuple[int, int], list[float]] = {}
    for i, j, distance, count in zip(atoms, shells.neighbor, shells.distance, shells.count, strict=True):
        found.setdefault((int(i), int(j)), []).extend([distance] * count)
    return {pair: np.sort(distances) for pair, distances in found.items()}


def brute_force(crystal: Crystal, radius: float) -> dict[tuple[int, int], np.ndarray]:
    """The same by trying every image in a box that is surely large enough."""
    fractional = np.linalg.solve(crystal.lattice.T, crystal.positions.T).T
    wrapped = (fractional % 1.0) @ crystal.lattice
    reach = np.ceil(radius / heights(crystal.lattice)).astype(int) + 1
    cells = np.stack(np.meshgrid(*[np.arange(-m, m + 1) for m in reach], indexing="ij"), -1).reshape(-1, 3)
    found = {}
    for i, here in enumerate(wrapped):
        for j, there in enumerate(wrapped):
            distances = np.linalg.norm(there - here + cells @ crystal.lattice, axis=1)
            if (distances <= radius).any():
                found[i, j] = np.sort(distances[distances <= radius])
    return found


def assert_same_images(found, expected):
    assert {pair: len(distances) for pair, distances in found.items()} == {p: len(d) for p, d in expected.items()}
    both = (np.concatenate([of[pair] for pair in expected]) for of in (found, expected))
    np.testing.assert_allclose(*both, rtol=0, atol=SHELL_GAP)  # merged images lie within it of their shell


@pytest.mark.parametrize("seed", range(12))
def test_random_cells_against_brute_force(seed):
    crystal = random_crystal(1 + seed % 7, seed, skew=0.3 + 0.1 * seed)
    for radius in (0.5 * heights(crystal.lattice).min(), 4.0, 9.0):
        assert_same_images(
            images(find_shells(crystal.positions, crystal.lattice, radius)), brute_force(crystal, radius)
        )


@cache
def pymatgens(name: int | str) -> tuple[int, dict[tuple[int, int], np.ndarray]]:
    """How many images pymatgen finds for each atom but itself, in all, and their distances as ``images`` has them."""
    from pymatgen.core import Lattice, Structure

    crystal, radius = KNOWN[name]
    structure = Structure(Lattice(crystal.lattice), crystal.numbers, crystal.positions, coords_are_cartesian=True)
    centre, point, _, distance = structure.get_neighbor_list(radius)
    expected = {(i, i): [0.0] for i in range(len(crystal))}  # pymatgen leaves out the atom itself
    for i, j, d in zip(centre.tolist(), point.tolist(), distance.tolist(), strict=True):
        expected.setdefault((i, j), []).append(d)
    return len(distance), {pair: np.sort(distances) for pair, distances in expected.items()}


LARGE = {
    "300 atoms, reduced cell": (random_crystal(300, seed=0, skew=0.1), 6.03),
    "300 atoms, skewed cell": (random_crystal(300, seed=1, skew=0.9), 6.03),
    "300 atoms, small radius": (random_crystal(300, seed=2, skew=0.5), 2.03),
    "100 atoms, radius beyond the cell": (random_crystal(100, seed=3, skew=0.3), 14.03),
    "needle": (supercell(random_crystal(4, seed=4), 1, 1, 40), 6.03),
    "sheet": (supercell(random_crystal(4, seed=5), 8, 8, 1), 6.03),
}
KNOWN = {**LARGE, **{i: (c, 6.03) for i, c in enumerate([*golden_crystals(), *embedded_crystals()])}}


@pytest.mark.parametrize("name", KNOWN)
def test_real_and_large_crystals_against_pymatgen(name):
    crystal, radius = KNOWN[name]
    others, expected = pymatgens(name)
    found = find_shells(crystal.positions, crystal.lattice, radius)
    assert found.count.sum() == others + len(crystal)
    assert_same_images(images(found), expected)


def test_the_embedded_crystals_are_extreme():
    sizes = [len(crystal) for crystal in embedded_crystals()]
    assert min(sizes) == 2
    assert max(sizes) == 152
    shape = [heights(c.lattice).max() / heights(c.lattice).min() for c in embedded_crystals()]
    assert max(shape) > 5


@pytest.mark.parametrize(
    ("crystal", "squares", "counts"),
    [
        (CUBIC, [0, 1, 2, 3, 4, 5], [1, 6, 12, 8, 6, 24]),
        (FACE_CENTRED, [0, 1, 2, 3, 4, 5], [1, 12, 6, 24, 12, 24]),
    ],
    ids=["simple cubic", "face-centred cubic"],
)
def test_shells_of_one_atom_cells_are_the_textbooks(crystal, squares, counts):
    shells = find_shells(crystal.positions, crystal.lattice, 2.3)
    np.testing.assert_allclose(shells.distance, np.sqrt(squares), atol=1e-12)
    assert shells.count.tolist() == counts
    assert shells.neighbor.tolist() == [0] * len(counts)
    assert shells.ptr.tolist() == [0, len(counts)]


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_sorted_and_begin_with_the_atom_itself(seed):
    crystal = random_crystal(5, seed)
    shells = find_shells(crystal.positions, crystal.lattice, 7.0)
    for atom in range(5):
        rows = slice(*shells.ptr[atom : atom + 2])
        assert (np.diff(shells.distance[rows]) >= 0).all()
        assert (shells.neighbor[rows][0], shells.distance[rows][0], shells.count[rows][0]) == (atom, 0.0, 1)
    assert shells.distance.max() <= 7.0
    assert (shells.count >= 1).all()


@pytest.mark.parametrize("index", range(5))
def test_relation_is_symmetric_bit_for_bit(index):
    crystal = golden_crystals()[index]
    shells = find_shells(crystal.positions, crystal.lattice, 8.0)
    atoms = np.repeat(np.arange(len(crystal)), np.diff(shells.ptr)).tolist()
    rows = list(zip(shells.distance.tolist(), shells.count.tolist(), strict=True))
    forward = sorted(zip(atoms, shells.neighbor.tolist(), rows, strict=True))
    backward = sorted(zip(shells.neighbor.tolist(), atoms, rows, strict=True))
    assert forward == backward


def test_the_radius_is_inclusive():
    assert find_shells(CUBIC.positions, CUBIC.lattice, 1.0).count.sum() == 7
    assert find_shells(CUBIC.positions, CUBIC.lattice, 1.0 - 1e-9).count.sum() == 1
    assert find_shells(CUBIC.positions, CUBIC.lattice, 1e-3).count.sum() == 1


@pytest.mark.parametrize(("gap", "rows"), [(0.4 * SHELL_GAP, 1), (4.0 * SHELL_GAP, 2)])
def test_equal_distances_are_one_shell_at_their_root_mean_square(gap, rows):
    lattice = np.diag([10.0, 10.0, 3.0])
    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 1.5 + gap / 2]])  # two images, at 1.5 -+ gap/2
    shells = find_shells(positions, lattice, 2.0)
    to_other = slice(1, shells.ptr[1])
    assert shells.count[to_other].sum() == 2
    assert len(shells.count[to_other]) == rows
    mean_square = (shells.count * shells.distance**2)[to_other].sum() / 2
    assert mean_square == pytest.approx(1.5**2 + gap**2 / 4, rel=1e-14)


@pytest.mark.parametrize("how", [name for name in REWRITTEN if "supercell" not in name and name != "all of it"])
def test_rows_do_not_depend_on_how_the_crystal_is_written(how):
    crystal = golden_crystals()[1]
    other = REWRITTEN[how](crystal)
    (a, b) = (find_shells(c.positions, c.lattice, 7.03) for c in (crystal, other))
    assert a.count.sum() == b.count.sum()
    np.testing.assert_allclose(np.sort(a.distance), np.sort(b.distance), atol=1e-9)


def test_a_large_cell_has_the_unit_cells_neighbours():
    unit = golden_crystals()[0]
    large = supercell(unit, 4, 4, 4)
    assert len(large) ** 2 * 27 > neighbors._DENSE_LIMIT
    radius = 6.03
    a, b = (find_shells(c.positions, c.lattice, radius) for c in (unit, large))
    copies = range(0, len(large), len(unit))
    expected = {(i + copy, j): distances for (i, j), distances in images(a).items() for copy in copies}
    assert_same_images(images(replace(b, neighbor=b.neighbor % len(unit))), expected)


def test_pairs_searched_in_parts_are_those_searched_at_once(monkeypatch):
    crystal = random_crystal(12, seed=0)
    at_once = find_shells(crystal.positions, crystal.lattice, 6.03)
    parts, images_of_pairs = [], neighbors._images_of_pairs

    def noted(positions, lattice, radius, i, j):
        parts.append(len(i))
        return images_of_pairs(positions, lattice, radius, i, j)

    monkeypatch.setattr(neighbors, "_images_of_pairs", noted)
    monkeypatch.setattr(neighbors, "_compiled_search", lambda: None)
    monkeypatch.setattr(neighbors, "_DENSE_LIMIT", 2_000_000)
    monkeypatch.setattr(neighbors, "_CHUNK", 2_000)
    found = find_shells(crystal.positions, crystal.lattice, 6.03)
    assert len(parts) > 1 and parts[-1] < parts[0]
    assert_same_images(images(found), images(at_once))


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan")])
def test_a_radius_that_is_not_positive_is_refused(radius):
    with pytest.raises(ValueError, match="radius must be greater than 0 Å, got"):
        find_shells(CUBIC.positions, CUBIC.lattice, radius)


def test_a_cell_without_volume_is_refused():
    flat = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    with pytest.raises(ValueError, match=r"lattice must span a volume, got \[\[1.0, 0.0, 0.0\]"):
        find_shells(np.zeros((1, 3)), flat, 5.0)
