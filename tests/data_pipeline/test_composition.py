"""Formulas, and the atoms of cells against them."""

import numpy as np
import pytest

from data_pipeline.composition import amounts_of, mismatch, parse_formula
from data_pipeline.crystal import Crystal, Disorder


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("Na Cl", {11: 1, 17: 1}),
        ("C12 H22 O11", {6: 12, 1: 22, 8: 11}),
        ("Ca0.5 Sr.5 TiO3", {20: 0.5, 38: 0.5, 22: 1, 8: 3}),
        ("D2 H2 O2", {1: 4, 8: 2}),
        ("Na0 Cl1", {17: 1}),
        ("?", None),
        ("", None),
        ("Al2 O3, x(H2 O)", None),
        ("NA1 CL1", None),
    ],
)
def test_formulas(text, amounts):
    assert parse_formula(text) == amounts


@pytest.mark.parametrize(
    ("formula", "found", "problem"),
    [
        ({11: 1, 17: 1}, {11: 4, 17: 4}, None),
        ({1: 80, 6: 60}, {1: 316, 6: 240}, "H80 C60, the sites of the cell are H316 C240"),
        ({11: 0.33, 17: 1}, {11: 4 * 0.333, 17: 4}, None),
        ({11: 1, 17: 1}, {11: 3.7, 17: 4}, "Na1 Cl1"),
        ({11: 1, 17: 1}, {11: 4}, "no Cl in the sites"),
        ({11: 1}, {11: 4, 17: 4}, "no Cl in the formula"),
    ],
)
def test_cells_against_formulas(formula, found, problem):
    answer = mismatch(formula, found)
    assert answer is None if problem is None else problem in answer


def test_atoms_of_a_cell_with_a_disordered_site():
    disorder = Disorder(site=np.array([2, 2]), atomic_number=np.array([1, 11]), occupancy=np.array([0.25, 0.5]))
    crystal = Crystal(
        positions=np.diag([0.0, 1.0, 2.0]),
        atomic_numbers=np.array([1, 1, 0]),
        lattice=4 * np.eye(3),
        disorder=disorder,
    )
    assert amounts_of(crystal) == {1: 2.25, 11: 0.5}
