"""What every source offers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from data_pipeline.info import TargetInfo
from data_pipeline.text import readable


class Source(Protocol):
    """A place with structures and targets.

    targets: in the order of the raw tables' columns. every_target: a row counts only where all targets are there
    (the published sets); otherwise one suffices. seconds_per_row: rough cost of parsing, checking and reducing a row
    on one core, by which prepare decides whether Ray is worth starting.
    """

    targets: tuple[TargetInfo, ...]
    every_target: bool
    seconds_per_row: float

    def fingerprint(self) -> str:
        """A digest that changes whenever the raw tables would. Cheap; downloads nothing. Raises DataError."""
        ...

    def tables(self) -> Iterator[pa.Table]:
        """The raw tables, in an order that does not change. Raises DataError where the source cannot be read."""
        ...


ARRAY_SECONDS = 1.5e-4
"""A row whose arrays are at hand, 12 atoms."""
TEXT_SECONDS = 1.6e-3
"""A row whose CIF text goes through pymatgen, 12 atoms; POSCAR takes a third of it, CIF with symmetry more."""


def files_digest(files: Mapping[Path, str | None]) -> str:
    """A digest of files in their order: of their names, contents, and the splits they are of."""
    content = "\n".join(f"{split} {readable(path.name)} {file_digest(path)}" for path, split in files.items())
    return hashlib.sha256(content.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
