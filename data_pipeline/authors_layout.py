"""The folder of a data set as the authors' programs lay it out: {train,val,test}/raw/raw_data.pkl."""

from __future__ import annotations

from pathlib import Path

from data_pipeline.splits import SPLITS

RAW_PICKLE = "raw/raw_data.pkl"
"""Where they leave the records of a split."""


def raw_pickles(folder: Path) -> dict[Path, str]:
    """The split of each such file that is there."""
    files = {folder / split / RAW_PICKLE: split for split in SPLITS}
    return {file: split for file, split in files.items() if file.is_file()}
