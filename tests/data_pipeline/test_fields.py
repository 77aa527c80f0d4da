"""Which fields are ids, structures and targets."""

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.fields import Place, choose_targets, target_from_heading, to_record

CELL = {"lattice_mat": (np.eye(3) * 4).tolist(), "coords": [[0, 0, 0]], "elements": ["Fe"], "cartesian": False}
PLACE = Place(file="f.json", row=7)


def test_units_behind_the_heading():
    for heading, name, unit in [
        ("bandgap (eV)", "bandgap", "eV"),
        ("shear [log10(GPa)]", "shear", "log10(GPa)"),
        ("formation energy", "formation_energy", ""),
        ("n", "n", ""),
    ]:
        target = target_from_heading(heading, "x.csv")
        assert (target.name, target.unit, target.column) == (name, unit, heading)


def test_targets_are_the_columns_of_numbers():
    sample = [
        {"id": "1", "": "0", "gap": "na", "n": "", "note": "x", "atoms": CELL, "odd": None, "late": "abc"},
        {"id": "2", "": "1", "gap": "1.5", "n": "2", "note": "3", "atoms": CELL, "odd": None, "late": "1"},
    ]
    assert [target.name for target in choose_targets(sample, (), "x")] == ["gap", "n"]
    assert [target.name for target in choose_targets(sample, ("late", "n"), "x")] == ["late", "n"]
    with pytest.raises(DataError, match="x: no column 'gapp'; it has id, , gap"):
        choose_targets(sample, ("gapp",), "x")
    with pytest.raises(DataError, match="no column of numbers"):
        choose_targets([{"id": 1, "structure": "s"}], (), "x")
    with pytest.raises(DataError, match="no fields"):
        choose_targets([], (), "x")


def test_records():
    target = target_from_heading("gap", "x")
    good = to_record({"jid": 12, "gap": "1.5", "atoms": CELL}, (target,), PLACE)
    assert (good.material_id, good.targets, good.problem, good.row) == ("12", [1.5], None, 7)
    assert good.crystal.atomic_numbers.tolist() == [26]
    unnamed = to_record({"gap": None, "cif": "text"}, (target,), PLACE)
    assert (unnamed.material_id, unnamed.kind, unnamed.text, unnamed.targets) == ("f.json-7", "cif", "text", [None])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"gap": "x", "atoms": CELL}, "bad target: gap: 'x' is not a number"),
        ({"gap": 1, "atoms": ""}, "empty structure"),
        ({"gap": 1, "structure": "{"}, "unreadable structure: field 'structure' is not JSON"),
        ({"gap": 1, "structure": 3}, "unreadable structure: field 'structure' is int"),
    ],
)
def test_problems(fields, problem):
    record = to_record(fields, (target_from_heading("gap", "x"),), PLACE)
    assert record.problem.startswith(problem) and record.crystal is None
