"""Each rule catches its own mistake."""

import math
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.crystal import EMPTY, Disorder
from data_pipeline.validate import closest_pair, is_number, parse_target, structure_problem
from tests.data_pipeline.samples import caesium_chloride, crystal, mixed_rock_salt, rock_salt

CUBE = np.eye(3) * 4.0


def test_good_crystals_pass():
    far = crystal(np.diag([1e4, 4, 4]), [[0, 0, 0], [-1e6, 0.5, 1e6 - 0.5]], [1, 1])
    for good in (rock_salt(), mixed_rock_salt(), caesium_chloride(z=98), far):
        assert structure_problem(good) is None


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (EMPTY, "empty structure"),
        (replace(rock_salt(), atomic_numbers=np.array([11])), "inconsistent structure: 8 positions for 1"),
        (crystal([[np.nan, 0, 0], [0, 4, 0], [0, 0, 4]], [[0, 0, 0]], [1]), "non-finite number: in the lattice"),
        (
            replace(crystal(CUBE, [[0, 0, 0]], [1]), positions=np.full((1, 3), np.inf)),
            "non-finite number: in the pos",
        ),
        (crystal([[4, 0, 0], [8, 0, 0], [0, 0, 4]], [[0, 0, 0]], [1]), "volume not above 0"),
        (caesium_chloride(z=99), "unknown element: atomic number 99"),
        (caesium_chloride(z=0), "unknown element: atomic number 0"),
        (crystal(CUBE, [[0, 0, 0], [0.1, 0, 0]], [1, 1]), "overlapping atoms: atoms 0 and 1 are 0.400"),
        (crystal(CUBE, [[0.02, 0.5, 0], [0.98, 0.5, 0]], [1, 1]), "overlapping atoms: .* 0.160"),
        (
            crystal([[0.4, 0, 0], [0, 4, 0], [0, 0, 4]], [[0, 0, 0]], [1]),
            "overlapping atoms: atom 0 and its own image",
        ),
        (
            crystal(CUBE, [[0, 0, 0], [0.5, -1e18, 0.5]], [1, 1]),
            r"number out of range: fractional coordinate -1e\+18 of atom 1 is not between -1e\+06 and 1e\+06",
        ),
        (crystal(CUBE, [[1e200, 0, 0]], [1]), r"number out of range: fractional coordinate 1e\+200 of atom 0"),
        (
            crystal(np.diag([4, 1e110, 4]), [[0, 0, 0]], [1]),
            r"number out of range: 1e\+110 Å in the lattice is not between -10000 and 10000",
        ),
    ],
)
def test_rules(bad, reason):
    import re

    assert re.match(reason, structure_problem(bad) or "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"site": np.zeros(8, np.int64)}, "wrong occupancies: disorder must list"),
        ({"occupancy": np.full(8, 0.6)}, "wrong occupancies: those of site 0 sum to 1.2"),
        ({"occupancy": np.array([0.5] * 7 + [0.0])}, "wrong occupancies: not all are in"),
        ({"atomic_number": np.full(8, 104)}, "unknown element: atomic number 104"),
    ],
)
def test_rules_of_disorder(change, reason):
    good = mixed_rock_salt()
    fields = {name: getattr(good.disorder, name) for name in ("site", "atomic_number", "occupancy")}
    assert (structure_problem(replace(good, disorder=Disorder(**{**fields, **change}))) or "").startswith(reason)


def test_closest_pair_agrees_with_brute_force_in_skewed_and_flat_cells():
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        lattice = rng.normal(size=(3, 3)) * 1.5
        if np.linalg.det(lattice) < 0.2:
            continue
        sample = crystal(lattice, rng.random((3, 3)), [1, 1, 1])
        far = np.array(np.meshgrid(*[range(-8, 9)] * 3)).reshape(3, -1).T @ lattice
        delta = sample.positions[:, None, None] - sample.positions[None, :, None] + far
        distance = np.linalg.norm(delta, axis=-1)
        shortest = distance[distance > 1e-9].min()
        close = closest_pair(sample, 0.9)
        assert (close is None) == (shortest >= 0.9)
        if close is not None:
            assert close[2] < 0.9
            found += 1
    assert found > 20


def test_large_cells_are_searched_in_pieces(monkeypatch):
    monkeypatch.setattr("data_pipeline.validate._PAIR_LIMIT", 8)
    assert structure_problem(rock_salt()) is None
    close = crystal(CUBE, [[0, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.6]], [1, 1, 1])
    assert structure_problem(close) == "overlapping atoms: atoms 1 and 2 are 0.400 Å apart, less than 0.5 Å"


@pytest.mark.parametrize("value", [None, "na", "NA", "", " nan ", float("nan"), "None"])
def test_missing_targets(value):
    assert parse_target(value) is None


@pytest.mark.parametrize(
    ("value", "what"), [("1.5", True), ("inf", True), (10**400, True), ("x", False), (True, False), ("na", None)]
)
def test_a_number_that_no_target_may_be_still_makes_a_column_of_numbers(value, what):
    assert is_number(value) is what


@pytest.mark.parametrize(("value", "number"), [("1.5", 1.5), (2, 2.0), (np.float32(0.5), 0.5), ("-1e-3", -1e-3)])
def test_numbers(value, number):
    assert parse_target(value) == number


@pytest.mark.parametrize("value", ["1,5", "abc", math.inf, "-inf", True, [1.0], {}, 1e300, "-3.1e38", 10**400])
def test_values_that_are_no_number(value):
    with pytest.raises(ValueError, match="is not a number|is not between -3e\\+38 and 3e\\+38"):
        parse_target(value)


def test_coordinates_that_overflow_cost_their_row_without_a_warning(recwarn):
    assert structure_problem(crystal(CUBE, [[1e308, -1e308, 0]], [1])) == "non-finite number: in the positions"
    assert not recwarn.list
