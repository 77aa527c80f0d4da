"""Structure tables as sources: Parquet files somebody wrote with this schema."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.errors import DataError
from data_pipeline.info import TargetInfo
from data_pipeline.raw import ROWS_PER_TABLE, from_structures
from data_pipeline.schema import VERSION_KEY, check_columns, check_schema, target_fields
from data_pipeline.sources.base import ARRAY_SECONDS, file_digest


def is_structure_table(path: Path) -> bool:
    """Whether a Parquet file says it is a structure table, of whatever version. Raises DataError if unreadable."""
    try:
        return VERSION_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from error


class StructureTableSource:
    """Parquet files with the columns of schema.py; all must have the targets of the first."""

    every_target = False
    seconds_per_row = ARRAY_SECONDS

    def __init__(self, files: Sequence[Path], wanted: Sequence[str] = ()) -> None:
        self.files = list(files)
        schema = pq.read_schema(self.files[0])
        check_schema(schema, str(self.files[0]))
        found = {target.name: target for target in target_fields(schema)}
        check_columns(schema, str(self.files[0]), wanted)
        self.targets: tuple[TargetInfo, ...] = tuple(found[name] for name in wanted or found)
        if not self.targets:
            raise DataError(f"{self.files[0]}: it has no target, that is no further column of type double")

    def fingerprint(self) -> str:
        """Digest of the files."""
        content = "\n".join(f"{path.name} {file_digest(path)}" for path in self.files)
        return hashlib.sha256(content.encode()).hexdigest()

    def tables(self) -> Iterator[pa.Table]:
        """The rows in the order of the files; NaN targets are missing ones."""
        for path in self.files:
            file = pq.ParquetFile(path)
            check_schema(file.schema_arrow, str(path))
            check_columns(file.schema_arrow, str(path), [target.name for target in self.targets])
            row = 0
            for batch in file.iter_batches(batch_size=ROWS_PER_TABLE):
                table = pa.Table.from_batches([batch])
                raw = from_structures(table, path.name, self.targets, first_row=row)
                row += len(raw)
                yield raw
