"""Structures from the formats of other programs agree with pymatgen's reading of them."""

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from data_pipeline.formats.parse import from_jarvis, from_pymatgen, from_pymatgen_dict, parse_structure

SKEWED = Lattice.from_parameters(4, 5, 6, 80, 95, 110)
PLAIN = Structure(SKEWED, ["Na+", "Cl-", "D"], [[0, 0, 0], [0.5, 0.5, 0.5], [0.1, 0.9, -0.3]])
MIXED = Structure(SKEWED, [{"Na": 0.5, "K": 0.25}, "Cl", {"O": 0.9}], [[0, 0, 0], [0.5, 0.5, 0.5], [0.1, 0.9, 0.3]])


def check(crystal, structure, tolerance=1e-12):
    assert np.allclose(crystal.lattice, structure.lattice.matrix, atol=tolerance)
    assert np.allclose(crystal.positions, structure.cart_coords, atol=tolerance)
    for i, site in enumerate(structure):
        species = sorted((specie.Z, amount) for specie, amount in site.species.items())
        if species == [(species[0][0], 1.0)]:
            assert crystal.atomic_numbers[i] == species[0][0]
            continue
        here = crystal.disorder.site == i
        pairs = zip(crystal.disorder.atomic_number[here], crystal.disorder.occupancy[here], strict=True)
        assert crystal.atomic_numbers[i] == 0 and sorted(pairs) == species


@pytest.mark.parametrize("structure", [PLAIN, MIXED])
def test_pymatgen_objects_and_dictionaries(structure):
    check(from_pymatgen(structure), structure)
    check(from_pymatgen_dict(structure.as_dict()), structure)
    assert (from_pymatgen(structure).disorder is None) == structure.is_ordered


def test_cif_and_poscar():
    mixed = parse_structure("cif", MIXED.to(fmt="cif"))
    check(mixed, Structure.from_str(MIXED.to(fmt="cif"), fmt="cif"))
    assert np.sort(mixed.disorder.occupancy).tolist() == [0.25, 0.5, 0.9]
    poscar = PLAIN.copy().remove_oxidation_states().to(fmt="poscar")
    assert parse_structure("poscar", poscar).atomic_numbers.tolist() == [11, 17, 1]


@pytest.mark.parametrize("words", [(False, True), ("False", "True"), (0, 1), ("false", " TRUE "), (0.0, np.True_)])
def test_jarvis_says_cartesian_in_many_ways(words):
    atoms = {"lattice_mat": SKEWED.matrix.tolist(), "elements": ["Na", " Cl ", "D"]}
    check(from_jarvis({**atoms, "coords": PLAIN.frac_coords.tolist(), "cartesian": words[0]}), PLAIN)
    check(from_jarvis({**atoms, "coords": PLAIN.cart_coords.tolist(), "cartesian": words[1]}), PLAIN)
    with pytest.raises(ValueError, match="unreadable structure: jarvis atoms: .*cartesian is 'maybe', not true"):
        from_jarvis({**atoms, "coords": PLAIN.cart_coords.tolist(), "cartesian": "maybe"})


@pytest.mark.parametrize("species", ["X", "Ln", {"Fe": 0.5, "Q": 0.5}])
def test_dummies_are_named_not_numbered(species):
    dummy = Structure(SKEWED, [species, "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    for parse, form in ((from_pymatgen, dummy), (from_pymatgen_dict, dummy.as_dict())):
        with pytest.raises(ValueError, match="^unknown element: '(X|Ln|Q)0?'?"):
            parse(form)


def test_jarvis_fractional_and_cartesian():
    atoms = {"lattice_mat": SKEWED.matrix.tolist(), "elements": ["Na", " Cl ", "D"]}
    fractional = from_jarvis({**atoms, "coords": PLAIN.frac_coords.tolist(), "cartesian": False})
    cartesian = from_jarvis({**atoms, "coords": PLAIN.cart_coords.tolist(), "cartesian": True})
    check(fractional, PLAIN)
    check(cartesian, PLAIN)


@pytest.mark.parametrize(
    ("parse", "message"),
    [
        (lambda: parse_structure("cif", "data_x\nloop_\n"), "unreadable structure: "),
        (lambda: parse_structure("poscar", "one\ntwo"), "unreadable structure: "),
        (lambda: parse_structure("pdb", ""), "unreadable structure: format 'pdb'"),
        (lambda: from_jarvis({"coords": []}), "unreadable structure: jarvis atoms: KeyError"),
        (lambda: from_pymatgen_dict({"lattice": {}}), "unreadable structure: pymatgen dictionary: KeyError"),
        (
            lambda: from_jarvis({"lattice_mat": np.eye(3), "coords": [[0] * 3], "elements": ["Zz"], "cartesian": 1}),
            "unknown element: 'Zz'",
        ),
    ],
)
def test_what_cannot_be_read_says_why(parse, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse()
    assert "\n" not in str(caught.value)
