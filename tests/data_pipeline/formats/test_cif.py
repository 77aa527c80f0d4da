"""CIF texts are read as the crystal they mean, or refused with the reason; pymatgen only warns of most of these."""

import threading

import numpy as np
import pytest
from pymatgen.core import Lattice, Structure

from data_pipeline.formats.cif import split_blocks
from data_pipeline.formats.parse import parse_structure

FM3M = "_symmetry_space_group_name_H-M 'F m -3 m'\n"
ROCK_SALT = "Na1 Na 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1\n"
HALF = "_chemical_formula_sum 'Na Cl'\n_cell_formula_units_Z "


def cif(symmetry=FM3M, sites=ROCK_SALT, more="", columns="", angle=90, name="x"):
    """Rock salt, or what is made of it; ``columns`` stand behind the occupancy."""
    cell = "".join(f"_cell_length_{axis} 5.64\n" for axis in "abc")
    cell += "".join(f"_cell_angle_{axis} {angle}\n" for axis in ("alpha", "beta", "gamma"))
    names = ("label", "type_symbol", "fract_x", "fract_y", "fract_z", "occupancy")
    loop = "loop_\n" + "".join(f"_atom_site_{column}\n" for column in names) + columns
    return f"data_{name}\n{cell}{symmetry}{more}{loop}{sites}"


def unlabelled(label):
    """Without type symbols, a first site of this label."""
    text = cif(sites=f"{label} 0 0 0 1\nCl1 0.5 0.5 0.5 1\n")
    return text.replace("_atom_site_type_symbol\n", "")


READ = {
    **{
        f"occupancy {value}": (cif(sites=f"Na1 Na 0 0 0 {value}\nCl1 Cl 0.5 0.5 0.5 1\n"), 8)
        for value in (".", "?", "1.0(1)", "1.005")
    },
    "symbol": (cif(), 8),
    "a group of one setting by its number, the symbol unknown": (
        cif("_symmetry_space_group_name_H-M 'F 4/m -3 2/m (ITA)'\n_symmetry_Int_Tables_number 225\n"),
        8,
    ),
    "number alone": (cif("_space_group_IT_number 221\n"), 2),
    "P 1": (cif("_symmetry_space_group_name_H-M 'P 1'\n"), 2),
    "x,y,z": (cif("_symmetry_equiv_pos_as_xyz 'x,y,z'\n"), 2),
    "no symmetry, but the sites are all": (cif("", more=f"{HALF}1\n"), 2),
    "formula and Z": (cif(more=f"{HALF}4\n"), 8),
    "a formula that says nothing": (cif(more="_chemical_formula_sum '?'\n"), 8),
    "a rounded formula": (
        cif(sites="Na1 Na 0 0 0 0.333\nCl1 Cl 0.5 0.5 0.5 1\n", more="_chemical_formula_sum 'Na0.33 Cl'\n"),
        8,
    ),
    "deuterium": (cif(sites="Na1 Na 0 0 0 1\nD1 D 0.5 0.5 0.5 1\n", more="_chemical_formula_sum 'H Na'\n"), 8),
    "no attached hydrogens": (
        cif(sites="Na1 Na 0 0 0 1 0\nCl1 Cl 0.5 0.5 0.5 1 0\n", columns="_atom_site_attached_hydrogens\n"),
        8,
    ),
    "attached hydrogens that are among the sites": (
        cif(
            sites="Na1 Na 0 0 0 1 1\nH1 H 0.5 0.5 0.5 1 0\n",
            columns="_atom_site_attached_hydrogens\n",
            more="_chemical_formula_sum 'H Na'\n",
        ),
        8,
    ),
    "origin told by the formula": (
        cif(FM3M.replace("m -3 m", "d -3 m"), "C1 C 0 0 0 1\n", "_chemical_formula_sum C\n_cell_formula_units_Z 8\n"),
        8,
    ),
    "a publication's block before it": (f"data_global\n_publ_section_title x\n{cif()}", 8),
    "a byte order mark": ("\ufeff" + cif(), 8),
}


@pytest.mark.parametrize("text, atoms", READ.values(), ids=READ)
def test_what_is_certain_is_read(text, atoms):
    crystal = parse_structure("cif", text)
    assert len(crystal.atomic_numbers) == atoms
    assert abs(np.linalg.det(crystal.lattice)) == pytest.approx(5.64**3)


REFUSED = {
    "symbol not known": (
        cif("_symmetry_space_group_name_H-M 'F 4/m -3 2/m (ITA)'\n"),
        "unknown symmetry: the symmetry 'F 4/m -3 2/m (ITA)' is not known",
    ),
    "symbol not known, number of several settings": (
        cif("_symmetry_space_group_name_H-M 'P 21 what'\n_symmetry_Int_Tables_number 14\n"),
        "unknown symmetry: the symmetry 'P 21 what', and group number 14 has several settings",
    ),
    "no symmetry": (cif(""), "unknown symmetry: the file states no symmetry, and formula and Z"),
    "no symmetry, and Z of more": (cif("", more=f"{HALF}4\n"), "unknown symmetry: the file states no symmetry"),
    "Z of another setting": (cif(more=f"{HALF}2\n"), "unknown symmetry: the symmetry 'F m -3 m' gives other atoms"),
    "cell of another setting": (cif(angle=80), "unknown symmetry: the symmetry 'F m -3 m' does not fit the cell"),
    "two origins": (
        cif(FM3M.replace("m -3 m", "d -3 m")),
        "unknown symmetry: the symmetry 'F d -3 m' has two origins",
    ),
    "operations that are none": (
        cif(f"loop_\n_symmetry_equiv_pos_as_xyz\n?\n{FM3M}"),
        "unknown symmetry: symmetry operation 1 of those listed",
    ),
    "missing element": (
        cif(sites="Fe1 Fe 0 0 0 1\n", more="_chemical_formula_sum 'Fe1 Cl1'\n"),
        "wrong composition: no Cl in the sites: the formula is Cl1 Fe1, the sites of the cell are Fe4",
    ),
    "element too many": (cif(more="_chemical_formula_sum 'Na'\n"), "wrong composition: no Cl in the formula"),
    "ratios": (
        cif(more="_chemical_formula_sum 'Na2 Cl1'\n"),
        "wrong composition: the formula is Na2 Cl1, the sites of the cell are Na4 Cl4",
    ),
    "implicit hydrogens": (
        cif(sites="Na1 Na 0 0 0 1 0\nO1 O 0.5 0.5 0.5 1 2\n", columns="_atom_site_attached_hydrogens\n"),
        "implicit hydrogens: some have no positions",
    ),
    "water as a site": (cif(sites="Na1 Na 0 0 0 1\nO1 Wat 0.5 0.5 0.5 1\n"), "implicit hydrogens: "),
    "occupancies": (
        cif(sites="Na1 Na 0 0 0 0.7\nK1 K 0 0 0 0.4\nCl1 Cl 0.5 0.5 0.5 1\n"),
        "wrong occupancies: those of a site sum to 1.1, more than 1.01",
    ),
    "group of atoms": (cif(sites="Na1 Na 0 0 0 1\nO1 OH 0.5 0.5 0.5 1\n"), "unknown element: site 'OH'"),
    "no symbol": (cif(sites="Na1 Na 0 0 0 1\nO1 ? 0.5 0.5 0.5 1\n"), "unknown element: site '?'"),
    **{
        f"type symbol {symbol}": (
            cif(sites=f"A1 {symbol} 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1\n"),
            f"unknown element: site {symbol!r} is no single element",
        )
        for symbol in "Vac VAC Va Vc Du Dum Tt Bq HOH H2O Cb WAT X Xx M1 Q Ln Fe/Ni Nb,Zr".split()
    },
    **{
        f"label {label}": (unlabelled(label), f"unknown element: site {label!r} is no single element")
        for label in "Vac1 Va1 Vc Du1 Dum Tt1 T1 Bq HOH H2O1 WAT1 X1 M1 Me2 Ln Fe/Ni1 Nb,Zr 1Fe".split()
    },
    **{
        f"occupancy {value}": (
            cif(sites=f"Na1 Na 0 0 0 {value}\nCl1 Cl 0.5 0.5 0.5 1\n"),
            f"wrong occupancies: '{value}' is no number from 0 to 1",
        )
        for value in ("-1", "nan", "50%", "1,0", "-0.5(2)")
    },
    "a coordinate left to its default": (
        cif(sites="Na1 Na 0 . 0 1\nCl1 Cl 0.5 0.5 0.5 1\n"),
        "unreadable structure: a site has no coordinate (_atom_site_fract_y is '.')",
    ),
    "dummy": (
        cif(sites="Na1 Na 0 0 0 1 d\nH1 H -1. -1. -1. 1 dum\n", columns="_atom_site_calc_flag\n"),
        "unreadable structure: some sites are dummies",
    ),
    "several": (
        cif(name="a") + cif(name="b"),
        "several structures: 2 data blocks hold atoms: a, b",
    ),
    "nothing": ("", "unreadable structure: no data block holds atoms"),
    "no fractional coordinates": (
        cif().replace("fract", "Cartn"),
        "unreadable structure: ValueError: the data block has no item _atom_site_fract_x",
    ),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED)
def test_what_may_be_another_crystal_is_refused(text, message):
    with pytest.raises(ValueError, match=".") as caught:
        parse_structure("cif", text)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "symbols", "labels"),
    [
        (26, "Fe FE fe Fe3+ Fe3+,spin=5 Fe,spin=-5 Fe2.50+ Fe+3 Fe0+ Fe1 Fe(III) Fe_a", "Fe1 FE1 Fe_1 Fe(1) Fe1a Fe"),
        (8, "O O2- OW Ow1", "O1W OW1 Ow O Oh1 O'"),
        (1, "H D D1 H1+ T HW", "H1D D1 HW1 H"),
        (6, "C Cval C1", "C Cb1 CX2 C1A"),
        (23, "V V5+", "V V1 V1a"),
    ],
)
def test_symbols_and_labels_of_elements(number, symbols, labels):
    texts = [cif(sites=f"A1 {symbol} 0 0 0 1\nCl1 Cl 0.5 0.5 0.5 1\n") for symbol in symbols.split()]
    for text in [*texts, *map(unlabelled, labels.split())]:
        assert sorted(set(parse_structure("cif", text).atomic_numbers.tolist())) == sorted([number, 17])


def test_rounded_occupancies_are_scaled_to_1():
    crystal = parse_structure("cif", cif(sites="Na1 Na 0 0 0 0.667\nK1 K 0 0 0 0.334\nCl1 Cl 0.5 0.5 0.5 1.002\n"))
    assert sorted(crystal.atomic_numbers.tolist()) == [0] * 4 + [17] * 4
    sums = np.bincount(crystal.disorder.site, crystal.disorder.occupancy, minlength=8)
    np.testing.assert_allclose(sums[crystal.atomic_numbers == 0], 1, rtol=1e-12)


def test_blocks():
    text = f"{cif(name='a')}data_publ\n_geom_bond_atom_site_label_1 Na1\n{cif(name='b')}"
    assert [block.name for block in split_blocks(text)] == ["a", "b"]
    assert [parse_structure("cif", block.text).atomic_numbers.size for block in split_blocks(text)] == [8, 8]
    assert [block.name for block in split_blocks("data_only\n_x y\n")] == ["only"]


@pytest.mark.parametrize("symprec", [None, 0.01])
def test_what_pymatgen_writes_is_read(symprec):
    for lattice, species, places in [
        (Lattice.hexagonal(3.2, 5.2), ["Zn", "Zn", "S", "S"], [[1 / 3, 2 / 3, 0], [2 / 3, 1 / 3, 0.5]]),
        (Lattice.rhombohedral(4.7, 60), ["Bi", "Bi", {"Sb": 0.5, "Bi": 0.5}, "Sb"], [[0.234] * 3, [0.766] * 3]),
        (Lattice.monoclinic(4, 5, 6, 103), ["C", "H", "O", "N"], [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]),
    ]:
        moved = np.array(places) + [0, 0, 0.375]
        whole = Structure(lattice, species, [*places, *(moved if lattice.gamma > 110 else np.array(places) + 0.1)])
        crystal = parse_structure("cif", whole.to(fmt="cif", symprec=symprec))
        assert len(crystal.atomic_numbers) / abs(np.linalg.det(crystal.lattice)) == pytest.approx(
            len(whole) / whole.volume
        )


def test_threads_do_not_share_what_is_warned_of():
    """Every reading goes by its own parser's warnings; those of Python belong to the whole process."""
    found = []

    def read(text):
        for _ in range(8):
            try:
                found.append((text, len(parse_structure("cif", text).atomic_numbers)))
            except ValueError as error:
                found.append((text, str(error).split(":")[0]))

    threads = [threading.Thread(target=read, args=(text,)) for text in (cif(), cif(""))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {(cif(), 8), (cif(""), "unknown symmetry")} and len(found) == 16
