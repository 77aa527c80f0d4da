"""A folder of CIF or POSCAR files with id_prop.csv, as CGCNN and ALIGNN lay it out.

A line of id_prop.csv is the name of a structure file (its ending, as .cif or .cif.gz, may be left out) and the values
of its targets. It needs no heading; with one, as in ``id,bandgap (eV),n``, targets get their names and units from it.
Otherwise they are ``target``, or ``target_0``, ``target_1`` and so on. A column headed ``split`` names the split of
each line.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from data_pipeline import compressed
from data_pipeline.compressed import inner_name, read_text
from data_pipeline.errors import DataError
from data_pipeline.fields import find_targets, targets_from_headings
from data_pipeline.info import TargetInfo
from data_pipeline.named_splits import is_split_column, named_split
from data_pipeline.raw import TEXTS_PER_TABLE, Record, raw_tables
from data_pipeline.sources.base import TEXT_SECONDS
from data_pipeline.validate import parse_target

INDEX = "id_prop.csv"
ENDINGS = {".cif": "cif", ".vasp": "poscar", ".poscar": "poscar", "": "poscar"}
"""Kinds of structure files, in the order in which they are tried for a name without ending."""


class FolderSource:
    """The structures that id_prop.csv lists."""

    every_target = False
    seconds_per_row = TEXT_SECONDS

    def __init__(self, folder: Path, wanted: Sequence[str] = ()) -> None:
        self.folder = folder
        index = folder / INDEX
        try:
            with index.open(encoding="utf-8-sig", newline="") as stream:
                lines = [[field.strip() for field in line] for line in csv.reader(stream)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{index}: cannot be read: {error}") from error
        lines = [line for line in lines if any(line)]
        if not lines or max(len(line) for line in lines) < 2:
            raise DataError(f"{index}: no line of it holds the name of a file and a target")
        columns, self._first = _heading(lines[0])
        self._rows = lines[self._first :]
        self._width = len(columns) + 1
        self._split = next((i for i, name in enumerate(columns, start=1) if is_split_column(name)), None)
        headed = [(name, i) for i, name in enumerate(columns, start=1) if name and i != self._split]
        places = dict(headed)
        if not headed or len(places) < len(headed):
            wrong = "two columns have one heading" if headed else "no column is a target"
            raise DataError(f"{index}: {wrong}; the first line is {', '.join(lines[0])}")
        self.targets: tuple[TargetInfo, ...] = targets_from_headings(tuple(places), INDEX)
        if wanted:
            self.targets = find_targets(self.targets, wanted, str(index), places)
        self._columns = [places[target.column] for target in self.targets]

    def fingerprint(self) -> str:
        """Digest of id_prop.csv and of every file it lists."""
        digest = hashlib.sha256((self.folder / INDEX).read_bytes())
        for row in self._rows:
            path = self._find(row[0])
            digest.update(f"{row[0]}\n".encode() if path is None else path.read_bytes())
        return digest.hexdigest()

    def tables(self) -> Iterator[pa.Table]:
        """The structures in the order of id_prop.csv."""
        records = (self._record(i, row) for i, row in enumerate(self._rows))
        return raw_tables(records, self.targets, TEXTS_PER_TABLE)

    def _record(self, number: int, row: list[str]) -> Record:
        try:
            if len(row) != self._width:
                raise ValueError(f"unreadable record: {len(row)} fields, but the first line has {self._width}")
            split = None if self._split is None else named_split(row[self._split])
            values = [self._value(row, column) for column in self._columns]
            path = self._find(row[0])
            if path is None:
                raise ValueError(f"missing file: {row[0]!r} is not in {self.folder.name}")
            kind, text = _kind(path), read_text(path)
        except OSError as error:
            problem = f"unreadable structure: {error.strerror or error}"
            return Record(file=INDEX, row=number + self._first, material_id=row[0], problem=problem)
        except ValueError as error:
            return Record(file=INDEX, row=number + self._first, material_id=row[0], problem=str(error))
        return Record(file=path.name, row=0, material_id=row[0], kind=kind, text=text, targets=values, split=split)

    def _value(self, row: list[str], column: int) -> float | None:
        try:
            return parse_target(row[column])
        except ValueError as error:
            raise ValueError(f"bad target: {error}") from error

    def _find(self, name: str) -> Path | None:
        """The structure file of a name, never outside the folder."""
        if not name or Path(name).name != name:
            return None
        for packed in ("", *compressed.ENDINGS):
            for ending in ("", *ENDINGS):
                path = self.folder / (name + ending + packed)
                if path.is_file():
                    return path
        return None


def _heading(first: list[str]) -> tuple[list[str], int]:
    """The names of the target columns, and the number of the first line that is not the heading."""
    try:
        for field in first[1:]:
            parse_target(field)
    except ValueError:
        return first[1:], 1
    count = len(first) - 1
    return (["target"] if count == 1 else [f"target_{i}" for i in range(count)]), 0


def _kind(path: Path) -> str:
    return ENDINGS.get(Path(inner_name(path)).suffix, "poscar")
