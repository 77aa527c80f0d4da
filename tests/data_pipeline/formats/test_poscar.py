"""POSCAR texts are read as VASP reads them, or refused."""

import numpy as np
import pytest

from data_pipeline.formats.parse import parse_structure

VECTORS = "0 .5 .5\n.5 0 .5\n.5 .5 0\n"


def poscar(scale="5.62", kind="Cartesian", names="Na Cl\n", tails=("", ""), vectors=VECTORS):
    return f"x\n{scale}\n{vectors}{names}1 1\n{kind}\n0 0 0 {tails[0]}\n.5 .5 .5 {tails[1]}\n"


def same(text, other):
    one, two = parse_structure("poscar", text), parse_structure("poscar", other)
    np.testing.assert_allclose(one.lattice, two.lattice, rtol=1e-12)
    np.testing.assert_allclose(one.positions, two.positions, rtol=1e-12, atol=1e-12)
    assert one.atomic_numbers.tolist() == two.atomic_numbers.tolist()


@pytest.mark.parametrize("kind", ["Cartesian", "Direct"])
@pytest.mark.parametrize(
    ("scale", "plain"), [(f"{-(5.62**3) / 4!r}", "5.62"), ("5.62 5.62 5.62", "5.62"), ("-0.25", "1")]
)
def test_scales_mean_the_same_crystal(kind, scale, plain):
    same(poscar(scale, kind), poscar(plain, kind))
    same(poscar(f"{scale} # comment", kind), poscar(plain, kind))


def test_three_scales_are_of_the_cartesian_components():
    crystal = parse_structure("poscar", poscar("2 3 4"))
    np.testing.assert_allclose(crystal.lattice, [[0, 1.5, 2], [1, 0, 2], [1, 1.5, 0]])
    np.testing.assert_allclose(crystal.positions[1], [1, 1.5, 2])


def test_symbols_behind_the_coordinates():
    same(poscar(names="", tails=("Ga", "As")), poscar(names="Ga As\n"))


def test_symbols_and_numbers_on_several_lines_and_comments_behind_them():
    same(poscar(names="Na\nCl\n").replace("1 1\n", "1\n1\n"), poscar())
    same(poscar(names="Na_pv/abc Cl ! salt\n").replace("1 1\n", "1 1 # of each\n"), poscar())


def test_a_byte_order_mark():
    same("\ufeff" + poscar(), poscar())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (poscar(names=""), "unknown element: the POSCAR names none (VASP 4 form)"),
        (
            poscar(kind="Selective\nDirect", names="", tails=("T T T", "F F F")),
            "unknown element: the POSCAR names none",
        ),
        (poscar("1 -2 3"), "unreadable structure: three scale factors must be positive, got 1 -2 3"),
        (poscar("-44", vectors="1 0 0\n0 1 0\n1 1 0\n"), "volume not above 0: "),
        (poscar().replace("1 1\n", "2\n"), "unreadable structure: the POSCAR names 2 elements (Na Cl), but has 1"),
        (
            poscar(names="Na Cl Br\n"),
            "unreadable structure: the POSCAR names 3 elements (Na Cl Br), but has 2 numbers of atoms (1 1)",
        ),
        (poscar(names="X Cl\n"), "unknown element: 'X'"),
        (poscar("large"), "unreadable structure: ValueError"),
        ("x\n-1\n1 0 0\n", "unreadable structure: "),
    ],
)
def test_what_cannot_be_known_is_refused(text, message):
    with pytest.raises(ValueError, match=".") as caught:
        parse_structure("poscar", text)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize("names", ["Na\n", ""])
def test_atoms_that_have_no_lines_take_no_memory(names):
    text = f"x\n1\n{VECTORS}{names}{10**12}\nDirect\n0 0 0\n"
    with pytest.raises(ValueError, match=r"unreadable structure: the POSCAR says 1e\+12 atoms, but has \d+ lines"):
        parse_structure("poscar", text)
