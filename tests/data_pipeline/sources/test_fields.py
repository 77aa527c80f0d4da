"""Which fields are ids, structures and targets."""

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.fields import Place, choose_targets, holds_text, targets_from_headings, to_record

CELL = {"lattice_mat": (np.eye(3) * 4).tolist(), "coords": [[0, 0, 0]], "elements": ["Fe"], "cartesian": False}
PLACE = Place(file="f.json", row=7)


GAP = targets_from_headings(["gap"], "x")


def test_a_target_tells_its_column():
    (target,) = targets_from_headings(["bandgap (eV)"], "x.csv")
    assert (target.name, target.unit, target.column) == ("bandgap", "eV", "bandgap (eV)")
    assert target.description == "column 'bandgap (eV)' of x.csv"


def test_targets_are_named_by_name_or_heading_also_with_commas():
    sample = [{"id": "1", "log10(K_VRH)": 1, "log10(G_VRH)": 2, "Band gap, eV": 3, "eV": 4, "a, b, c": 5, "a": 6}]
    assert len({target.name for target in choose_targets(sample, (), "x")}) == 6
    for words in ["log10(G_VRH),Band gap, eV,eV", "log10_G_VRH,Band_gap,eV", "log10(G_VRH),Band gap,eV,eV"]:
        wanted = tuple(word.strip() for word in words.split(","))
        assert [t.column for t in choose_targets(sample, wanted, "x")] == ["log10(G_VRH)", "Band gap, eV", "eV"]
    assert [t.column for t in choose_targets(sample, ("a", "b", "c", "a"), "x")] == ["a, b, c", "a"]
    with pytest.raises(DataError, match="x: no column 'b'; it has id, "):
        choose_targets(sample, ("a", "b"), "x")


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
    good = to_record({"jid": 12, "gap": "1.5", "atoms": CELL}, GAP, PLACE)
    assert (good.material_id, good.targets, good.problem, good.row) == ("12", [1.5], None, 7)
    assert good.crystal.atomic_numbers.tolist() == [26]
    unnamed = to_record({"gap": None, "cif": "text"}, GAP, PLACE)
    assert (unnamed.material_id, unnamed.kind, unnamed.text, unnamed.targets) == ("f.json-7", "cif", "text", [None])


@pytest.mark.parametrize("heading", ["ID", "Material ID", "mp-id", " material_id ", "JID", "Task-ID"])
def test_ids_by_other_spellings(heading):
    assert to_record({heading: "m1", "gap": 1, "atoms": CELL}, GAP, PLACE).material_id == "m1"
    assert not to_record({heading: "m1", "gap": 1, "atoms": CELL}, GAP, PLACE).id_is_name
    assert [t.name for t in choose_targets([{heading: 1, "gap": 2}], (), "x")] == ["gap"]
    exact = to_record({heading: "other", "material_id": "m1", "atoms": CELL}, (), PLACE)
    assert exact.material_id == "m1"


@pytest.mark.parametrize("heading", ["CIF", " cif", "Cif "])
def test_structures_by_other_spellings(heading):
    record = to_record({"gap": 1, heading: "text"}, GAP, PLACE)
    assert (record.kind, record.text, record.problem) == ("cif", "text", None)
    assert holds_text({heading: "text"}) and not holds_text({"atoms": "{}"})


def test_a_cif_in_a_field_for_json():
    text = "data_x\n_cell_length_a 4\n"
    record = to_record({"gap": 1, "Structure": text}, GAP, PLACE)
    assert (record.kind, record.text, record.problem) == ("cif", text, None)


def test_the_index_of_pandas_is_no_target():
    sample = [{"__index_level_0__": 3, "Unnamed: 0": 1, "Index": 2, "gap": 1.5}]
    assert [target.name for target in choose_targets(sample, (), "x")] == ["gap"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"gap": "x", "atoms": CELL}, "bad target: gap: 'x' is not a number"),
        ({"gap": 1, "atoms": CELL, "split": "holdout"}, "unknown split: 'holdout'; allowed are train, val"),
        ({"gap": 1, "atoms": CELL, "Split": 0}, "unknown split: 0"),
        ({"gap": 1, "atoms": ""}, "empty structure"),
        ({"gap": 1, "structure": "{"}, "unreadable structure: field 'structure' is not JSON"),
        ({"gap": 1, "structure": 3}, "unreadable structure: field 'structure' is int"),
    ],
)
def test_problems(fields, problem):
    record = to_record(fields, GAP, PLACE)
    assert record.problem.startswith(problem) and record.crystal is None


def test_the_split_of_a_record():
    fields = {"gap": 1, "atoms": CELL}
    for value, split in [
        ("train", "train"),
        (" Validation ", "val"),
        ("dev", "val"),
        ("TESTING", "test"),
        ("", None),
    ]:
        assert to_record({**fields, "split": value}, GAP, PLACE).split == split
    assert to_record({**fields, "Split": "test"}, GAP, PLACE).split == "test"
    assert to_record({**fields, "split": float("nan")}, GAP, PLACE).split is None
    of_file = Place(file="train/raw_data.pkl", row=1, split="train")
    assert to_record(fields, GAP, of_file).split == "train"
    assert to_record({**fields, "split": "training"}, GAP, of_file).problem is None
    other = to_record({**fields, "split": "val"}, GAP, of_file)
    assert other.problem == "contradicting splits: the row is for val, its file for train"
    assert to_record({**fields, "split": "holdout"}, (), PLACE).problem is None, "nobody prepares it"
