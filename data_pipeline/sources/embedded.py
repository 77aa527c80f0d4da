"""The structure tables that ship with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.info import DatasetInfo, TargetInfo
from data_pipeline.schema import check_columns, check_schema
from data_pipeline.sources.base import ARRAY_SECONDS, file_digest
from data_pipeline.sources.raw import ROWS_PER_TABLE, from_structures

FOLDER = Path(__file__).parent.parent / "embedded"


class EmbeddedSource:
    """One embedded set; CITATIONS.md beside it says where it comes from."""

    every_target = True
    seconds_per_row = ARRAY_SECONDS

    def __init__(self, info: DatasetInfo) -> None:
        self.targets: tuple[TargetInfo, ...] = info.targets
        self.path = FOLDER / f"{info.name}.parquet"

    def fingerprint(self) -> str:
        """Digest of the file."""
        return file_digest(self.path)

    def tables(self) -> Iterator[pa.Table]:
        """The rows in file order."""
        table = pq.read_table(self.path)
        check_schema(table.schema, self.path.name)
        check_columns(table.schema, self.path.name, [target.name for target in self.targets])
        raw = from_structures(table, self.path.name, self.targets)
        for start in range(0, len(raw), ROWS_PER_TABLE):
            yield raw.slice(start, ROWS_PER_TABLE)
