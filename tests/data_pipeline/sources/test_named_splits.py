"""How a source may name the split of a row."""

import pytest

from data_pipeline.sources.named_splits import is_split_column, named_split


def test_words():
    for split, words in {
        "train": "train Training",
        "val": "val valid VALIDATION dev",
        "test": "test testing",
    }.items():
        assert {named_split(word) for word in words.split()} == {split}
    assert {named_split(empty) for empty in (None, "", " ", "NA", float("nan"))} == {None}
    assert named_split("", "val") == named_split("dev", "val") == "val"


@pytest.mark.parametrize("value", ["holdout", 0, 1.0, True, ["train"], "train,val"])
def test_other_words(value):
    with pytest.raises(ValueError, match="unknown split: .*; allowed are train, val"):
        named_split(value)


def test_a_row_and_its_file_that_differ():
    with pytest.raises(ValueError, match="contradicting splits: the row is for test, its file for train"):
        named_split("test", "train")


def test_columns():
    assert is_split_column("split") and is_split_column(" Split ")
    assert not is_split_column("splits") and not is_split_column(3)
