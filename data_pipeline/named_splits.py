"""Splits that a source names itself, row by row, in a column ``split``."""

from __future__ import annotations

from data_pipeline.validate import MISSING

COLUMN = "split"
_NAMES = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def is_split_column(heading: object) -> bool:
    """Whether a field of this name says the split of its row."""
    return isinstance(heading, str) and heading.strip().lower() == COLUMN


def named_split(value: object, of_file: str | None = None) -> str | None:
    """ "train", "val" or "test" as ``value`` says, or as the row's file does where the value is empty; None: neither.

    Raises ValueError for any other value, and where the row and its file differ.
    """
    empty = value is None or value != value or str(value).strip().lower() in MISSING
    if empty:
        return of_file
    split = _NAMES.get(str(value).strip().lower())
    if split is None:
        raise ValueError(f"unknown split: {value!r:.60}; allowed are train, val (valid, validation, dev) and test")
    if of_file not in (None, split):
        raise ValueError(f"contradicting splits: the row is for {split}, its file for {of_file}")
    return split
