"""Splits that a source names itself: row by row, in a column ``split``, or by the names of its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.formats.compressed import inner_name
from data_pipeline.splits import SPLITS
from data_pipeline.validate import MISSING

COLUMN = "split"
_NAMES = {
    "train": "train",
    "training": "train",
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SHARD = re.compile(r"(?P<name>[a-z]+)(?:[-_.]?\d.*)?")
"""The name of a file without its endings: the split, and the number of a shard, as in train-00000-of-00004."""


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


def splits_of_files(files: Sequence[Path]) -> dict[Path, str | None]:
    """The split each file is named after, as in train.csv, valid.csv, test.csv; None for all where none is.

    Raises DataError where some files are named so and others are not, or a split has no file: those rows would be
    shuffled together, and models tested on what they were trained on.
    """
    found = {file: _split_of_file(file) for file in files}
    if not any(found.values()):
        return found
    named = next(file for file, split in found.items() if split is not None)
    other = next((file for file, split in found.items() if split is None), None)
    if other is not None:
        raise DataError(f"{other}: belongs to no split, though {named.name} beside it does; take one of them away")
    lacking = [split for split in SPLITS if split not in found.values()]
    if lacking:
        raise DataError(
            f"{named}: named after a split, but no file beside it is {' or '.join(lacking)}; "
            f"name files after all of {', '.join(SPLITS)}, or none"
        )
    return found


def _split_of_file(file: Path) -> str | None:
    found = _SHARD.fullmatch(inner_name(file).rpartition(".")[0])
    return None if found is None else _NAMES.get(found["name"])
