"""The raw rows of a source while they are being prepared: in memory while few, in a staging folder when many."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.download import Progress
from data_pipeline.sources.base import Source

PART_FIELD = pa.field("part", pa.int32())
_MARKER = "raw.json"
_INDEX_COLUMNS = ("source_file", "source_row", "material_id", "problem", "split", "id_is_name")


class RawStore:
    """Raw tables of one source, numbered. Staged ones survive a crash: the next run goes on where it happened."""

    def __init__(self, staging: Path) -> None:
        self.staging = staging
        self._tables: list[pa.Table] = []
        self.parts: list[Path] = []
        self.rows: list[int] = []

    @property
    def staged(self) -> bool:
        """Whether the tables are on disk."""
        return bool(self.parts)

    @property
    def num_rows(self) -> int:
        """Rows of all tables."""
        return sum(self.rows)

    def fill(self, source: Source, stage_from: int, progress: Progress | None = None) -> None:
        """Read the source; once it has ``stage_from`` rows, its tables go to the staging folder.

        ``progress`` is then told how many have been read; how many there are shows at the end only.
        """
        if self._resume():
            return
        for table in source.tables():
            numbered = table.append_column(PART_FIELD, pa.array(np.full(len(table), len(self.rows), np.int32)))
            self.rows.append(len(table))
            self._tables.append(numbered)
            if self.num_rows >= stage_from:
                self._spill()
                if progress is not None:
                    progress("records read", self.num_rows, self.num_rows)
        if self.staged:
            self._spill()
            with written_whole(self.staging / _MARKER) as partial:
                partial.write_text(json.dumps({"rows": self.rows}))

    def tables(self) -> Iterator[pa.Table]:
        """The tables in order."""
        if self.staged:
            yield from (pq.read_table(part) for part in self.parts)
        else:
            yield from self._tables

    def index(self, targets: Sequence[str]) -> pa.Table:
        """Names, problems, splits and targets of all rows, without the structures."""
        columns = [*_INDEX_COLUMNS, *targets]
        if self.staged:
            return pa.concat_tables([pq.read_table(part, columns=columns) for part in self.parts])
        return pa.concat_tables([table.select(columns) for table in self._tables])

    def _spill(self) -> None:
        self.staging.mkdir(parents=True, exist_ok=True)
        for table in self._tables:
            part = self.staging / f"raw-{len(self.parts):05d}.parquet"
            write_atomically(table, part)
            self.parts.append(part)
        self._tables.clear()

    def _resume(self) -> bool:
        """Take over the tables of an earlier run that had read its source to the end, if they are whole.

        A machine that lost its power may have left files that are empty: the source is then read again.
        """
        if not is_staged(self.staging):
            return False
        rows = _rows_told(self.staging / _MARKER)
        parts = [self.staging / f"raw-{i:05d}.parquet" for i in range(len(rows))]
        if not rows or any(rows_in(part) != n for part, n in zip(parts, rows, strict=True)):
            (self.staging / _MARKER).unlink()
            return False
        self.rows, self.parts = rows, parts
        return True


def is_staged(staging: Path) -> bool:
    """Whether a run that read its source to the end has left the tables in this folder."""
    return (staging / _MARKER).is_file()


def _rows_told(marker: Path) -> list[int]:
    """The rows of every table by the marker; none where it cannot be read."""
    try:
        rows = json.loads(marker.read_text())["rows"]
        return [int(n) for n in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def rows_in(path: Path) -> int | None:
    """Rows of a Parquet file; None where there is no such file, or a damaged one."""
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return None


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name to write under, which no other attempt at ``path`` shares; renamed to it at the end.

    The content is on the disk before: after a loss of power the name would else stand for an empty file.
    """
    partial = path.with_name(f"{path.stem}.{uuid4().hex}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(table: pa.Table, path: Path) -> None:
    """Write a Parquet file that is whole where it has its name."""
    with written_whole(path) as partial:
        pq.write_table(table, partial, compression="zstd")


def null_mask(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """(rows,) where a column is null or NaN."""
    return np.asarray(column.is_null(nan_is_null=True).to_numpy(), dtype=np.bool_)
