"""Structures that a user names on the command line: files, folders of files, and structure tables."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.crystal import Crystal, read_crystals
from data_pipeline.errors import DataError
from data_pipeline.parse import from_pymatgen, parse_structure
from data_pipeline.reduce import ReductionError, primitive_cell
from data_pipeline.schema import check_schema
from data_pipeline.table import checked_files
from data_pipeline.validate import structure_problem

if TYPE_CHECKING:
    import pyarrow as pa

KNOWN_FILES = ("*.cif", "*poscar*", "*contcar*", "*.vasp", "*.json", "*.xsf", "*.cssr", "*.res", "*.mcif", "*.yaml")
"""Names, in lower case, of the files that are taken from a folder; a file named itself may be called anything."""
_ROWS = 1024
"""Rows of a structure table read at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A structure as the model wants it, or why there is none.

    id: the file as it was named, or the row's material_id. where: what a message calls it.
    """

    id: str
    where: str
    crystal: Crystal | None = None
    problem: str | None = None


def find_structures(inputs: Sequence[str]) -> Iterator[Found]:
    """Every structure of ``inputs`` in their order: checked, and in the primitive cell, as training sees it."""
    for name in inputs:
        path = Path(name)
        if path.is_dir() and not any(path.glob("*.parquet")):
            yield from _of_folder(path)
        elif path.is_dir() or path.suffix.lower() == ".parquet":
            yield from _of_table(path)
        else:
            yield _of_file(path)


def _of_folder(folder: Path) -> Iterator[Found]:
    """The structure files of a folder by name; hidden ones and those in folders below are left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and _is_known(path))
    if not files:
        reason = f"holds no structure file ({', '.join(KNOWN_FILES)}) and no structure table (*.parquet)"
        yield Found(id=str(folder), where=str(folder), problem=reason)
    for path in files:
        yield _of_file(path)


def _is_known(path: Path) -> bool:
    name = path.name.lower()
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in KNOWN_FILES)


def _of_file(path: Path) -> Found:
    try:
        crystal = _read(path)
    except OSError as error:
        return Found(id=str(path), where=str(path), problem=error.strerror or str(error))
    except ValueError as error:
        return Found(id=str(path), where=str(path), problem=" ".join(str(error).split()))
    return _finished(str(path), str(path), crystal)


def _read(path: Path) -> Crystal:
    """The crystal of a CIF, a POSCAR or any other file pymatgen reads. Raises OSError or ValueError."""
    name = path.name.lower()
    if name.endswith(".cif"):
        return parse_structure("cif", path.read_text(encoding="utf-8", errors="replace"))
    if name.endswith(".vasp") or "poscar" in name or "contcar" in name:
        return parse_structure("poscar", path.read_text(encoding="utf-8", errors="replace"))
    with path.open("rb"):
        pass  # a file that is not there is said to be so, and not of an unknown format
    from pymatgen.core.structure import Structure

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            structure = Structure.from_file(path)
    except Exception as error:  # noqa: BLE001 - the parsers raise errors of every kind on malformed text
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"unreadable structure: {reason:.200}") from error
    if not isinstance(structure, Structure):
        raise ValueError(f"unreadable structure: the file holds a {type(structure).__name__}")
    return from_pymatgen(structure)


def _of_table(path: Path) -> Iterator[Found]:
    try:
        row = 0
        for table in _pieces(path):
            ids = table.column("material_id").to_pylist()
            for name, crystal in zip(ids, read_crystals(table), strict=True):
                yield _finished(name, f"{path} row {row} {name}", crystal)
                row += 1
    except (DataError, OSError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        yield Found(id=str(path), where=str(path), problem=reason)


def _pieces(path: Path) -> Iterator[pa.Table]:
    """The rows of a structure table, a file or a folder of files. Raises DataError where it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in checked_files(path) if path.is_dir() else [path]:
        try:
            with pq.ParquetFile(file) as reader:
                check_schema(reader.schema_arrow, str(file))
                for batch in reader.iter_batches(batch_size=_ROWS):
                    yield pa.Table.from_batches([batch])
        except pa.ArrowInvalid as error:
            raise DataError(f"{file}: not a Parquet file: {error}") from error


def _finished(name: str, where: str, crystal: Crystal) -> Found:
    """The crystal in its primitive cell, or what is wrong with it."""
    problem = structure_problem(crystal)
    if problem is not None:
        return Found(id=name, where=where, problem=problem)
    try:
        return Found(id=name, where=where, crystal=primitive_cell(crystal))
    except ReductionError as error:
        return Found(id=name, where=where, problem=str(error))
