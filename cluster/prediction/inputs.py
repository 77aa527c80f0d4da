"""Structures that a user names on the command line: files, folders of files, and structure tables.

They are planned as pieces first, so that many can be read in any order and by several processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from data_pipeline.crystal import Crystal, read_crystals
from data_pipeline.errors import DataError
from data_pipeline.formats.cif import split_blocks
from data_pipeline.formats.compressed import inner_name, read_text
from data_pipeline.formats.other_files import read_other
from data_pipeline.formats.parse import parse_structure
from data_pipeline.formats.refusal import TOO_DEEP
from data_pipeline.prepared import is_prepared
from data_pipeline.schema import FIXED_COLUMNS, check_schema
from data_pipeline.steps.reduce import ReductionError, primitive_cell
from data_pipeline.text import readable
from data_pipeline.validate import structure_problem

KNOWN_FILES = (
    *("*.cif", "*.mcif", "*poscar*", "*contcar*", "*.vasp", "*.json", "*.jsonl"),
    *("*.xsf", "*.cssr", "*.res", "*.yaml"),
)
"""Names, in lower case and without .gz, .bz2 or .xz, of the files that are taken from a folder; a file named itself
may be called anything."""

STREAM_FROM = 20_000
"""Structures from which they are predicted through Ray (screening.py): its start takes some 20 s."""

RECORDS = (".json", ".jsonl", ".csv")
"""Endings of files of records; those of a folder are taken without .csv, which as often lists its files."""

COUNTED_BYTES = 4_000_000
"""A file of records of so many bytes or more is a piece of its own, whose records are counted: 20,000 small ones fit
in it where it is compressed. Counting takes some 0.05 ms a record."""

FILES_A_PIECE = 128
ROWS_A_PIECE = 1024
PIECES_A_GROUP = 64
"""Of a row group at most: each piece of one decodes it from its beginning."""

_ROWS = 1024
"""Rows of a structure table read at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A structure as the model wants it, or why there is none.

    id: the file as it was named, or the row's material_id. where: what a message calls it. Halves of characters, as
    in names that are not UTF-8, become escapes: no file of answers could hold them.
    """

    id: str
    where: str
    crystal: Crystal | None = None
    problem: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "where"):
            object.__setattr__(self, name, readable(getattr(self, name)))
        if self.problem is not None:
            object.__setattr__(self, "problem", readable(self.problem))


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """Some structures of the inputs: files, or ``rows`` rows of a table, or what is wrong with an input.

    records: how many a large file of records holds.
    group, first: where the rows begin in the file, its row group and the row of that. row: number of the first row
    in the file, for messages.
    """

    paths: tuple[str, ...]
    rows: int = 0
    group: int = 0
    first: int = 0
    row: int = 0
    records: int = 0
    problem: str | None = None

    @property
    def count(self) -> int:
        """Structures in it; a file is counted as one, though a small one of records may hold more."""
        return self.rows or self.records or len(self.paths)


def plan_pieces(inputs: Sequence[str]) -> list[Piece]:
    """All of ``inputs`` in their order, as pieces to be read one by one; structures are not looked at yet."""
    pieces: list[Piece] = []
    files: list[Path] = []
    for name in inputs:
        try:
            others, more = _look_at(Path(name))
        except OSError as error:  # such as a folder that may not be entered
            others, more = [Piece(paths=(name,), problem=str(error.strerror or error))], []
        if others:
            pieces += [*_of_files(files), *others]
            files = []
        files += more
    return [*pieces, *_of_files(files)]


def _look_at(path: Path) -> tuple[list[Piece], list[Path]]:
    """The pieces of an input but those of its files, and these. OSError where it cannot be looked at."""
    if is_prepared(path.parent, path.name) and (path / "test").is_dir():
        problem = f"is a prepared data set; name a split in it, as {path / 'test'}"
        return [Piece(paths=(str(path),), problem=problem)], []
    folder = path.is_dir()
    tables = [path] if path.suffix.lower() == ".parquet" and not folder else _tables_in(path)
    files = _known_files(path) if folder else []
    return [*chain.from_iterable(map(_of_table, tables))], files or ([] if tables else [path])


def find_structures(inputs: Sequence[str]) -> Iterator[Found]:
    """Every structure of ``inputs`` in their order: checked, and in the primitive cell, as training sees it."""
    for piece in plan_pieces(inputs):
        yield from read_piece(piece)


def read_piece(piece: Piece) -> Iterator[Found]:
    """The structures of a piece, in order."""
    if piece.problem is not None:
        yield Found(id=piece.paths[0], where=piece.paths[0], problem=piece.problem)
    elif piece.rows:
        yield from _of_rows(piece)
    else:
        for path in piece.paths:
            yield from _of_file(Path(path))


def _of_files(files: Sequence[Path]) -> Iterator[Piece]:
    for large, run in groupby(files, _is_large):
        some, step = list(run), 1 if large else FILES_A_PIECE
        for start in range(0, len(some), step):
            paths = tuple(map(str, some[start : start + step]))
            yield Piece(paths=paths, records=_records_in(some[start]) if large else 0)


def _is_large(path: Path) -> bool:
    """Whether it is a file of records that may hold very many."""
    return inner_name(path).endswith(RECORDS) and path.is_file() and path.stat().st_size >= COUNTED_BYTES


def _records_in(path: Path) -> int:
    """Records of a file, as far as it can be read: the structures after that are a problem told later."""
    from data_pipeline.sources.records import iter_fields

    count = 0
    with suppress(DataError):
        for _ in iter_fields(path):
            count += 1
    return max(count, 1)


def _tables_in(folder: Path) -> list[Path]:
    """The structure tables of a folder; none where it is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() == ".parquet")


def _known_files(folder: Path) -> list[Path]:
    """The structure files of a folder by name; hidden ones and those in folders below are left out."""
    return sorted(path for path in folder.iterdir() if path.is_file() and _is_known(path))


def _is_known(path: Path) -> bool:
    name = inner_name(path)
    return not name.startswith(".") and any(fnmatch(name, pattern) for pattern in KNOWN_FILES)


def _of_file(path: Path) -> Iterator[Found]:
    name = str(path)
    if path.is_dir():
        known = f"{', '.join(KNOWN_FILES)}; also .gz, .bz2, .xz"
        reason = f"holds no structure file ({known}) and no structure table (*.parquet)"
        yield Found(id=name, where=name, problem=reason)
        return
    try:
        yield from _in_file(path)
    except OSError as error:
        yield Found(id=name, where=name, problem=error.strerror or str(error))
    except RecursionError:
        yield Found(id=name, where=name, problem=f"unreadable file: {TOO_DEEP}")
    except ValueError as error:
        yield Found(id=name, where=name, problem=" ".join(str(error).split()).removeprefix(f"{path}: "))


def _in_file(path: Path) -> Iterator[Found]:
    """The structures of a file, by its name. Raises OSError or ValueError where it cannot be read to its end."""
    name = inner_name(path)
    if name.endswith(RECORDS):
        yield from _of_records(path)
    elif ".cif" in name or ".mcif" in name:
        yield from _of_cif(path)
    elif name.endswith(".vasp") or "poscar" in name or "contcar" in name:
        yield _parsed(str(path), "poscar", read_text(path))
    else:
        yield _finished(str(path), str(path), read_other(path))


def _of_cif(path: Path) -> Iterator[Found]:
    """The structures of a CIF: one, called as the file is, or as FILE#BLOCK one for every data block with atoms."""
    text = read_text(path)
    blocks = split_blocks(text)
    if len(blocks) < 2:
        yield _parsed(str(path), "cif", text)
        return
    names = Counter(block.name for block in blocks)
    for number, block in enumerate(blocks):
        unique = block.name if block.name and names[block.name] == 1 else f"{block.name}-{number}"
        yield _parsed(f"{path}#{unique}", "cif", block.text)


def _parsed(name: str, kind: str, text: str) -> Found:
    try:
        return _finished(name, name, parse_structure(kind, text))
    except ValueError as error:
        return Found(id=name, where=name, problem=str(error))


def _of_records(path: Path) -> Iterator[Found]:
    """The structures of a JSON or CSV file: one, or records. A single one without an id is called as the file is."""
    from data_pipeline.sources.records import iter_fields

    records = iter_fields(path)
    first, second = next(records, None), next(records, None)
    if first is None:
        raise ValueError("holds no record")
    if second is None:
        yield _of_record(first, str(path), str(path))
        return
    for number, fields in enumerate(chain([first, second], records)):
        yield _of_record(fields, f"{path}-{number}", f"{path} record {number}")


def _of_record(fields: Mapping[str, Any] | str, default: str, where: str) -> Found:
    """A structure itself, as pymatgen or jarvis writes it, or a record with one among its fields.

    default: the id of a record that has none.
    """
    from data_pipeline.sources.fields import Place, find_id, to_record

    if isinstance(fields, str):
        return Found(id=default, where=where, problem=fields)
    bare = "lattice_mat" in fields or ("lattice" in fields and "sites" in fields)
    own = find_id(fields)
    record = to_record({"structure": fields} if bare else fields, (), Place(file=default, row=0))
    name = default if own is None else own[0]
    where = f"{where} {name}" if own is not None and where != name else where
    if record.problem is not None:
        return Found(id=name, where=where, problem=record.problem)
    try:
        crystal = parse_structure(record.kind, record.text or "") if record.kind else record.crystal
    except ValueError as error:
        return Found(id=name, where=where, problem=str(error))
    return Found(id=name, where=where, problem="no structure") if crystal is None else _finished(name, where, crystal)


def _of_table(path: Path) -> Iterator[Piece]:
    """The pieces of a structure table in a file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        try:
            with path.open("rb") as file, pq.ParquetFile(file) as reader:
                check_schema(reader.schema_arrow, str(path))
                sizes = [reader.metadata.row_group(g).num_rows for g in range(reader.num_row_groups)]
        except pa.ArrowInvalid as error:
            raise DataError(f"not a Parquet file: {error}") from error
        row = 0
        for group, size in enumerate(sizes):
            step = max(ROWS_A_PIECE, -(-size // PIECES_A_GROUP))
            for first in range(0, size, step):
                count = min(step, size - first)
                yield Piece(paths=(str(path),), rows=count, group=group, first=first, row=row + first)
            row += size
    except (DataError, OSError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).removeprefix(f"{path}: ")
        yield Piece(paths=(str(path),), problem=reason)


def _of_rows(piece: Piece) -> Iterator[Found]:
    """The structures of some rows of a table; where it is damaged, the rows left are one problem."""
    row = piece.row
    try:
        for name, crystal in _rows(piece):
            where = f"{piece.paths[0]} row {row}"
            if name is None:
                yield _finished(f"{piece.paths[0]}-{row}", where, crystal)
            else:
                yield _finished(name, f"{where} {name}", crystal)
            row += 1
    except (OSError, ValueError) as error:
        rows = f"{piece.paths[0]} rows {row} to {piece.row + piece.rows - 1}"
        yield Found(id=piece.paths[0], where=rows, problem=f"unreadable file: {' '.join(str(error).split()):.300}")


def _rows(piece: Piece) -> Iterator[tuple[str | None, Crystal]]:
    """Id, if it has one, and crystal of every row of a piece. Raises OSError or ValueError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    before, end = 0, piece.first + piece.rows
    columns = [name for name, _ in FIXED_COLUMNS]
    # Opened here, as pyarrow opens no file whose name is no text.
    with Path(piece.paths[0]).open("rb") as file, pq.ParquetFile(file) as reader:
        for batch in reader.iter_batches(batch_size=_ROWS, row_groups=[piece.group], columns=columns):
            low, high = max(piece.first - before, 0), min(end - before, len(batch))
            before += len(batch)
            if high > low:
                table = pa.Table.from_batches([batch.slice(low, high - low)]).combine_chunks()
                yield from zip(table.column("material_id").to_pylist(), read_crystals(table), strict=True)
            if before >= end:
                return


def _finished(name: str, where: str, crystal: Crystal) -> Found:
    """The crystal in its primitive cell, or what is wrong with it."""
    problem = structure_problem(crystal)
    if problem is not None:
        return Found(id=name, where=where, problem=problem)
    try:
        return Found(id=name, where=where, crystal=primitive_cell(crystal))
    except ReductionError as error:
        return Found(id=name, where=where, problem=str(error))
