"""Structure tables as sources: Parquet files somebody wrote with this schema."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.info import TargetInfo
from data_pipeline.schema import VERSION_KEY, check_columns, check_schema, target_fields
from data_pipeline.sources.base import ARRAY_SECONDS, files_digest
from data_pipeline.sources.named_splits import is_split_column, named_split
from data_pipeline.sources.raw import ROWS_PER_TABLE, Record, from_structures, raw_tables


def are_structure_tables(files: Sequence[Path]) -> bool:
    """Whether the first Parquet file that can be read says it is a structure table, of whatever version.

    Raises DataError if none can be read.
    """
    return VERSION_KEY in (_first_schema(files)[1].metadata or {})


def _first_schema(files: Sequence[Path]) -> tuple[Path, pa.Schema]:
    """The first file whose schema can be read, with it. Raises DataError if there is none."""
    broken: Exception | None = None
    for path in files:
        try:
            with path.open("rb") as stream:  # pyarrow opens no path that is not UTF-8
                return path, pq.read_schema(stream)
        except (pa.ArrowInvalid, OSError) as error:
            broken = broken or error
    raise DataError(f"{files[0]}: not a Parquet file: {broken}") from broken


class StructureTableSource:
    """Parquet files with the columns of schema.py; all must have the targets of the first.

    What cannot be read of a file is a rejected row; the others are used.
    """

    every_target = False
    seconds_per_row = ARRAY_SECONDS

    def __init__(self, files: Mapping[Path, str | None], wanted: Sequence[str] = ()) -> None:
        """files: the split of each file, None where a column of it or the recipe decides. Raises DataError."""
        self.files = dict(files)
        first, schema = _first_schema(list(self.files))
        check_schema(schema, str(first))
        found = {target.name: target for target in target_fields(schema)}
        check_columns(schema, str(first), wanted)
        self.targets: tuple[TargetInfo, ...] = tuple(found[name] for name in wanted or found)
        if not self.targets:
            raise DataError(f"{first}: it has no target, that is no further column of type double")

    def fingerprint(self) -> str:
        """Digest of the files."""
        return files_digest(self.files)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in the order of the files; NaN targets are missing ones."""
        for path in self.files:
            row = 0
            try:
                with path.open("rb") as stream:
                    for raw in self._tables(path, stream):
                        yield raw
                        row += len(raw)
            except (pa.ArrowInvalid, OSError) as error:
                problem = f"unreadable file: from row {row} on: {' '.join(str(error).split()):.300}"
                yield from raw_tables(
                    [Record(file=path.name, row=row, material_id="", problem=problem)], self.targets
                )

    def _tables(self, path: Path, stream: BinaryIO) -> Iterator[pa.Table]:
        file = pq.ParquetFile(stream)
        check_schema(file.schema_arrow, str(path))
        check_columns(file.schema_arrow, str(path), [target.name for target in self.targets])
        row = 0
        for batch in file.iter_batches(batch_size=ROWS_PER_TABLE):
            table = pa.Table.from_batches([batch])
            raw = from_structures(table, path.name, self.targets, first_row=row)
            row += len(raw)
            yield _with_splits(raw, table, self.files[path])


def _with_splits(raw: pa.Table, table: pa.Table, of_file: str | None) -> pa.Table:
    """The raw table of ``table``, with the splits that a column of it names, if it has one, or its file."""
    name = next((name for name in table.column_names if is_split_column(name)), None)
    if name is None and of_file is None:
        return raw
    named = [None] * len(raw) if name is None else table.column(name).to_pylist()
    splits: list[str | None] = [None] * len(raw)
    problems: list[str | None] = raw.column("problem").to_pylist()
    for i, value in enumerate(named):
        try:
            splits[i] = named_split(value, of_file)
        except ValueError as error:
            problems[i] = problems[i] or str(error)
    for column, values in (("split", splits), ("problem", problems)):
        index = raw.schema.get_field_index(column)
        raw = raw.set_column(index, raw.schema.field(index), pa.array(values, pa.string()))
    return raw
