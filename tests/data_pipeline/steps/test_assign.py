"""Which rows are dealt to splits."""

import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.info import SplitRecipe
from data_pipeline.splits import make_split
from data_pipeline.steps.assign import assign_splits, count_rules, with_ids

RECIPE = SplitRecipe(ratios=(0.5, 0.25, 0.25))


def index(n, **columns):
    full = {
        "source_file": ["f.csv"] * n,
        "source_row": list(range(n)),
        "material_id": [f"m{i}" for i in range(n)],
        "problem": pa.nulls(n, pa.string()),
        "split": pa.nulls(n, pa.string()),
        "id_is_name": [False] * n,
        "a": pa.array([1.0] * n),
        "b": pa.array([1.0] * n),
    }
    return pa.table({**full, **columns})


def test_only_usable_rows_are_counted_by_the_recipe():
    table = index(12, a=pa.array([1.0, None] * 6), problem=pa.array(["bad: x", *[None] * 11]))
    every = assign_splits(table, ["a", "b"], RECIPE, every_target=True)
    usable = [2, 4, 6, 8, 10]
    split = make_split(5, RECIPE)
    assert every.usable == 5 and every.outside == {"missing target: a": 6} and list(every.problems) == [0]
    assert [i for i in range(12) if every.codes[i] == 0] == sorted(usable[i] for i in split.train)
    assert every.ends[0] == (f"m{usable[split.train[0]]}", f"m{usable[split.train[-1]]}")
    some = assign_splits(table, ["a", "b"], RECIPE, every_target=False)
    assert some.usable == 11 and some.outside == {}
    nothing = assign_splits(index(12, a=pa.array([1.0] * 11 + [None])), ["a"], RECIPE, every_target=False)
    assert nothing.problems == {11: "missing target: a"}


def test_where_no_row_can_be_used_the_first_is_named():
    broken = {"problem": pa.array(["missing file: 'x'", *["missing file: 'y'"] * 3]), "source_row": [4, 5, 6, 7]}
    with pytest.raises(DataError) as caught:
        assign_splits(index(4, **broken), ["a"], RECIPE, every_target=True)
    assert str(caught.value) == (
        "none of the 4 rows can be used: 4 x missing file; the first: f.csv row 4 m0: missing file: 'x'"
    )


def test_a_duplicate_tells_file_and_row_of_the_first():
    places = {"source_file": ["a.csv"] * 4 + ["b.csv"] * 4, "source_row": [*range(4), *range(4)]}
    plan = assign_splits(index(8, material_id=list("abcdebfg"), **places), ["a"], RECIPE, every_target=True)
    assert plan.problems == {5: "duplicate id: 'b' is a.csv row 1 already"}
    twice = assign_splits(index(8, material_id=list("abcdeffg"), **places), ["a"], RECIPE, every_target=True)
    assert twice.problems == {6: "duplicate id: 'f' is b.csv row 1 already"}


def test_later_duplicates_are_problems():
    plan = assign_splits(index(8, material_id=list("abcabcde")), ["a"], RECIPE, every_target=True)
    assert plan.problems == {
        3: "duplicate id: 'a' is f.csv row 0 already",
        4: "duplicate id: 'b' is f.csv row 1 already",
        5: "duplicate id: 'c' is f.csv row 2 already",
    }
    assert plan.usable == 8


def test_rows_of_one_name_are_told_apart():
    named = {"material_id": ["NaCl", "KCl", "NaCl", "MgO", "NaCl-2", "KCl"], "id_is_name": [True] * 5 + [False]}
    plan = assign_splits(index(6, **named), ["a"], RECIPE, every_target=True)
    assert plan.problems == {} and plan.ids == {0: "NaCl-0", 1: "KCl-1", 2: "NaCl-2-2"}
    table = with_ids(index(6, **named).slice(2, 2), plan.ids, start=2)
    assert table["material_id"].to_pylist() == ["NaCl-2-2", "MgO"]
    files = {"source_file": ["a", "a", "b", "b"], "source_row": [0, 1, 0, 1]}
    two = index(4, material_id=["NaCl"] * 4, id_is_name=[True] * 4, **files)
    assert assign_splits(two, ["a"], RECIPE, every_target=True).ids == {
        0: "NaCl-0",
        1: "NaCl-1",
        2: "NaCl-0-2",
        3: "NaCl-1-3",
    }


def test_prescribed_splits():
    plan = assign_splits(index(4, split=["val", "train", "test", "train"]), ["a"], RECIPE, every_target=True)
    assert plan.codes.tolist() == [1, 0, 2, 0] and plan.ends[0] == ("m1", "m3") and plan.own_splits
    with pytest.raises(DataError, match="split is named 'dev'"):
        assign_splits(index(4, split=["val", "dev", "test", "train"]), ["a"], RECIPE, every_target=True)


def test_prescribed_splits_with_gaps():
    with pytest.raises(DataError) as caught:
        assign_splits(index(4, split=["val", None, None, "train"]), ["a"], RECIPE, every_target=True)
    assert str(caught.value) == (
        "2 of 4 usable rows have no split, though the others do; the first is f.csv row 1 m1: "
        "name the split of all rows (train, val, test) or of none"
    )
    with pytest.raises(DataError, match="2 train, 0 val, 1 test; each split needs at least 1 row"):
        assign_splits(index(3, split=["train", "test", "train"]), ["a"], RECIPE, every_target=True)
    table = index(4, split=["val", None, "test", "train"], problem=pa.array([None, "unreadable record", None, None]))
    plan = assign_splits(table, ["a"], RECIPE, every_target=True)
    assert plan.codes.tolist() == [1, -1, 2, 0], "a row that cannot be used needs no split"


def test_rules_are_counted_commonest_first():
    reasons = ["overlapping atoms: 1", "unknown element: 2", "overlapping atoms: 3"]
    assert list(count_rules(reasons).items()) == [("overlapping atoms", 2), ("unknown element", 1)]
