"""A folder of CIF or POSCAR files with id_prop.csv, as CGCNN and ALIGNN lay it out.

A line of id_prop.csv is the name of a structure file, in the folder or one below it (its ending, as .cif or .cif.gz,
may be left out), and the values of its targets. It needs no heading; with one, as in ``id,bandgap (eV),n``, targets
get their names and units from it. Otherwise they are ``target``, or ``target_0``, ``target_1`` and so on. A column
headed ``split`` names the split of each line.
"""

from __future__ import annotations

import csv
import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from data_pipeline.errors import DataError
from data_pipeline.formats import compressed
from data_pipeline.formats.compressed import inner_name, read_text
from data_pipeline.info import TargetInfo
from data_pipeline.sources.base import TEXT_SECONDS
from data_pipeline.sources.fields import find_targets, targets_from_headings
from data_pipeline.sources.named_splits import is_split_column, named_split
from data_pipeline.sources.raw import TEXTS_PER_TABLE, Record, raw_tables
from data_pipeline.validate import is_number, parse_target

INDEX = "id_prop.csv"
ENDINGS = {".cif": "cif", ".vasp": "poscar", ".poscar": "poscar", "": "poscar", ".mcif": "cif"}
"""Kinds of structure files, in the order in which they are tried for a name without ending."""
_TAILS = tuple(ending + packed for packed in ("", *compressed.ENDINGS) for ending in ("", *ENDINGS))
_LONGEST_FIRST = sorted(_TAILS, key=len, reverse=True)
_OTHERS = frozenset(".json .jsonl .xyz .extxyz .xsf .cssr .res .yaml .yml .pdb .mol .csv .parquet .pkl".split())
"""Endings of files that are no POSCAR, as one called after a composition with a dot in it may be."""


class FolderSource:
    """The structures that id_prop.csv lists."""

    every_target = False
    seconds_per_row = TEXT_SECONDS

    def __init__(self, folder: Path, wanted: Sequence[str] = ()) -> None:
        self.folder = folder
        index = folder / INDEX
        try:
            with index.open(encoding="utf-8-sig", newline="") as stream:
                read = [[field.strip() for field in line] for line in csv.reader(stream)]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{index}: cannot be read: {error}") from error
        lines = [(row, line) for row, line in enumerate(read) if any(line)]
        self._files = _Files(folder)
        _check_commas(index, [line for _, line in lines], self._files)
        first = lines[0][1]
        columns, skipped = _heading(first, is_data=self._files.find(first[0]) is not None)
        self._rows = lines[skipped:]
        self._width = len(columns) + 1
        self._split = next((i for i, name in enumerate(columns, start=1) if is_split_column(name)), None)
        headed = [(name, i) for i, name in enumerate(columns, start=1) if name and i != self._split]
        places = dict(headed)
        if not headed or len(places) < len(headed):
            wrong = "two columns have one heading" if headed else "no column is a target"
            raise DataError(f"{index}: {wrong}; the first line is {', '.join(first)}")
        self.targets: tuple[TargetInfo, ...] = targets_from_headings(tuple(places), INDEX)
        if wanted:
            self.targets = find_targets(self.targets, wanted, str(index), places)
        self._columns = [places[target.column] for target in self.targets]

    def fingerprint(self) -> str:
        """Digest of id_prop.csv and of every file it lists."""
        digest = hashlib.sha256((self.folder / INDEX).read_bytes())
        for _, line in self._rows:
            path = self._files.find(line[0])
            try:
                digest.update(f"{line[0]}\n".encode() if path is None else path.read_bytes())
            except OSError as error:  # a rejected row later, and another digest once it can be read
                digest.update(f"{line[0]}: {error.strerror}\n".encode())
        return digest.hexdigest()

    def tables(self) -> Iterator[pa.Table]:
        """The structures in the order of id_prop.csv."""
        return raw_tables(self._records(), self.targets, TEXTS_PER_TABLE)

    def _records(self) -> Iterator[Record]:
        listed: dict[str, str] = {}
        for number, row in self._rows:
            record = self._record(number, row)
            earlier = listed.setdefault(record.file, row[0]) if record.problem is None else row[0]
            if earlier != row[0]:
                problem = f"duplicate file: {record.file} is listed as {earlier!r} already"
                record = Record(file=INDEX, row=number, material_id=row[0], problem=problem)
            yield record

    def _record(self, number: int, row: list[str]) -> Record:
        try:
            if len(row) != self._width:
                raise ValueError(f"unreadable record: {len(row)} fields, but the first line has {self._width}")
            split = None if self._split is None else named_split(row[self._split])
            values = [_value(row[i], t.column) for i, t in zip(self._columns, self.targets, strict=True)]
            path = self._files.find(row[0])
            if path is None:
                raise ValueError(f"missing file: {row[0]!r} is not in {self.folder.name}")
            kind, text = _kind(path), read_text(path)
        except OSError as error:
            problem = f"unreadable structure: {error.strerror or error}"
            return Record(file=INDEX, row=number, material_id=row[0], problem=problem)
        except ValueError as error:
            return Record(file=INDEX, row=number, material_id=row[0], problem=str(error))
        return Record(
            file=path.relative_to(self.folder).as_posix(),
            row=0,
            material_id=row[0],
            kind=kind,
            text=text,
            targets=values,
            split=split,
        )


class _Files:
    """The structure files of a folder and those below it, by the names that users give them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, dict[str, Path]] = {}

    def find(self, name: str) -> Path | None:
        """The structure file of a name, never outside the folder. Raises DataError where that cannot be listed."""
        parts = [part for part in name.replace("\\", "/").split("/") if part != "."]
        if not name or not all(parts) or ".." in parts:
            return None
        known = self._listed(self.folder.joinpath(*parts[:-1]))
        names = [parts[-1] + tail for tail in _TAILS]
        return next((known[name] for name in (*names, *map(_spelled, names)) if name in known), None)

    def _listed(self, folder: Path) -> dict[str, Path]:
        if folder not in self._known:
            try:
                files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
            except OSError as error:
                raise DataError(f"{folder}: cannot be listed: {error.strerror}") from error
            exact = {path.name: path for path in files}
            self._known[folder] = {_spelled(path.name): path for path in files} | exact
        return self._known[folder]


def _value(field: str, column: str) -> float | None:
    try:
        return parse_target(field)
    except ValueError as error:
        raise ValueError(f"bad target: {column}: {error}") from error


def _spelled(name: str) -> str:
    """A name of a file with its ending in small letters, and its accents as one character, as most systems have."""
    name = unicodedata.normalize("NFC", name)
    tail = next(tail for tail in _LONGEST_FIRST if name.lower().endswith(tail))
    return name[: len(name) - len(tail)] + tail


def _check_commas(index: Path, lines: Sequence[list[str]], files: _Files) -> None:
    """Raises DataError unless commas separate a name and a target, as far as can be told."""
    first = lines[0][0] if lines else ""
    other = next((word for mark, word in ((";", "semicolons"), ("\t", "tabs")) if mark in first), None)
    if other is not None and files.find(first) is None:
        raise DataError(f"{index}: fields are separated by {other}, not by commas; the first line is {first!r:.60}")
    if not lines or max(len(line) for line in lines) < 2:
        raise DataError(f"{index}: no line of it holds the name of a file and a target, separated by a comma")


def _heading(first: list[str], *, is_data: bool) -> tuple[list[str], int]:
    """The names of the target columns, and the number of the first line that is not the heading.

    is_data: the line begins with the name of a file, whatever its values are.
    """
    if not is_data and any(is_number(field) is False for field in first[1:]):
        return first[1:], 1
    count = len(first) - 1
    return (["target"] if count == 1 else [f"target_{i}" for i in range(count)]), 0


def _kind(path: Path) -> str:
    suffix = Path(inner_name(path)).suffix
    if suffix in _OTHERS:
        raise ValueError(f"unreadable structure: {path.name} is neither a CIF nor a POSCAR file")
    return ENDINGS.get(suffix, "poscar")
