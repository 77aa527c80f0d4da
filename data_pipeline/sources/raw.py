"""Raw tables: what a source yields, before structures are parsed, checked and reduced.

A raw table has, a row a record of the source: ``source_file``, ``source_row`` (from 0), ``problem`` (null, or why the
record is unusable already), ``split`` (null, or the split the source prescribes), ``id_is_name`` (whether the id is
but a name, which other rows may have too), ``kind`` and ``text`` (null, or a structure still to be parsed: "cif" or
"poscar"), the columns of a structure table, and its targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np
import pyarrow as pa

from data_pipeline.crystal import EMPTY, Crystal, structure_columns
from data_pipeline.info import TargetInfo
from data_pipeline.schema import STRUCTURE_COLUMNS, structure_schema
from data_pipeline.text import readable
from data_pipeline.validate import MAX_TARGET, beyond_targets

ROWS_PER_TABLE = 1024
TEXTS_PER_TABLE = 256
"""Rows of a table whose structures are still to be parsed: 0.4 s of work, so that many cores have their share."""
EXTRA_FIELDS: tuple[pa.Field, ...] = (
    pa.field("source_file", pa.string()),
    pa.field("source_row", pa.int64()),
    pa.field("problem", pa.string()),
    pa.field("split", pa.string()),
    pa.field("id_is_name", pa.bool_()),
    pa.field("kind", pa.string()),
    pa.field("text", pa.large_string()),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of a source: a crystal, or the text of one and its kind, or the problem it has.

    targets: a value a target of the data set, in its order; None where missing; empty if there is a problem.
    """

    file: str
    row: int
    material_id: str
    crystal: Crystal | None = None
    kind: str | None = None
    text: str | None = None
    targets: Sequence[float | None] = field(default=())
    problem: str | None = None
    split: str | None = None
    id_is_name: bool = False


def raw_schema(targets: Sequence[TargetInfo]) -> pa.Schema:
    """The schema of a raw table."""
    table = structure_schema(targets)
    return pa.schema([*EXTRA_FIELDS, *(table.field(i).with_nullable(nullable=True) for i in range(len(table)))])


def raw_tables(
    records: Iterable[Record], targets: Sequence[TargetInfo], rows: int = ROWS_PER_TABLE
) -> Iterator[pa.Table]:
    """Pack records into raw tables of ``rows`` rows."""
    stream = map(_as_text, records)
    while chunk := list(islice(stream, rows)):
        yield _raw_table(chunk, targets)


def from_structures(table: pa.Table, file: str, targets: Sequence[TargetInfo], first_row: int = 0) -> pa.Table:
    """A raw table from a structure table's rows, in order; the first has number ``first_row`` in its file."""
    n = len(table)
    problems: list[str | None] = [None] * n
    for target in targets:
        values = table.column(target.name).to_numpy()
        for row in np.flatnonzero(np.abs(values) > MAX_TARGET).tolist():
            problems[row] = f"bad target: {target.name}: {beyond_targets(values[row].item())}"
    for row in np.flatnonzero(table.column("material_id").is_null().to_numpy()).tolist():
        problems[row] = "unreadable record: no material_id"
    columns = {
        "source_file": pa.array([readable(file)] * n, pa.string()),
        "source_row": pa.array(range(first_row, first_row + n), pa.int64()),
        "problem": pa.array(problems, pa.string()),
        "split": pa.nulls(n, pa.string()),
        "id_is_name": pa.repeat(pa.scalar(False), n),  # noqa: FBT003 - a value
        "kind": pa.nulls(n, pa.string()),
        "text": pa.nulls(n, pa.large_string()),
    }
    schema = raw_schema(targets)
    cast = [columns[f.name] if f.name in columns else table.column(f.name).cast(f.type) for f in schema]
    return pa.table(cast, schema=schema)


def _as_text(record: Record) -> Record:
    """The record in texts that a table can hold; with a problem where its id or structure holds half a character.

    A name of a file is written with escapes: the record is not the worse for it.
    """
    file, name, text = readable(record.file), readable(record.material_id), record.text or ""
    if record.problem is not None:
        return replace(record, file=file, material_id=name, text=None, problem=readable(record.problem))
    if name != record.material_id or text != readable(text):
        problem = "unreadable record: holds half a character (a lone surrogate)"
        return Record(file=file, row=record.row, material_id=name, problem=problem)
    return record if file == record.file else replace(record, file=file)


def _raw_table(records: Sequence[Record], targets: Sequence[TargetInfo]) -> pa.Table:
    schema = raw_schema(targets)
    structures = structure_columns([record.crystal or EMPTY for record in records])
    columns: dict[str, object] = {
        "source_file": [record.file for record in records],
        "source_row": [record.row for record in records],
        "problem": [record.problem for record in records],
        "split": [record.split for record in records],
        "id_is_name": [record.id_is_name for record in records],
        "kind": [record.kind for record in records],
        "text": [record.text for record in records],
        "material_id": [record.material_id for record in records],
        **dict(zip((name for name, _ in STRUCTURE_COLUMNS), structures, strict=True)),
    }
    for i, target in enumerate(targets):
        columns[target.name] = [record.targets[i] if record.targets else None for record in records]
    return pa.table(columns, schema=schema)
