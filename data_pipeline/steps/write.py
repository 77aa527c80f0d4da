"""Write the splits of a processed data set as Parquet shards of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_pipeline.crystal import list_values
from data_pipeline.info import TargetInfo
from data_pipeline.schema import structure_schema
from data_pipeline.splits import SPLITS
from data_pipeline.validate import MAX_ATOMIC_NUMBER

ROWS_PER_GROUP = 8192
ROWS_PER_FILE = 16 * ROWS_PER_GROUP


class SplitWriter:
    """Appends rows to the shards of one split; where batches begin and end leaves no trace in the files."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.schema = schema
        self.rows = 0
        self._pending: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Append the structure columns and targets of ``table``."""
        self._pending.append(table.select(self.schema.names).cast(self.schema))
        while sum(len(part) for part in self._pending) >= ROWS_PER_GROUP:
            self._write_group()

    def close(self) -> None:
        """Write what is left; a split without rows still gets a file."""
        if self._pending or not self.rows:
            self._write_group()
        if self._writer is not None:
            self._writer.close()

    def _write_group(self) -> None:
        table = pa.concat_tables([self.schema.empty_table(), *self._pending])
        group = table.slice(0, ROWS_PER_GROUP).combine_chunks()
        rest = table.slice(ROWS_PER_GROUP)
        self._pending = [rest] if len(rest) else []
        if self.rows % ROWS_PER_FILE == 0:
            if self._writer is not None:
                self._writer.close()
            path = self.folder / f"part-{self.rows // ROWS_PER_FILE:05d}.parquet"
            self._writer = pq.ParquetWriter(path, self.schema, compression="zstd", use_dictionary=False)
        if self._writer is not None:
            self._writer.write_table(group, row_group_size=ROWS_PER_GROUP)
        self.rows += len(group)


class DatasetWriter:
    """The three splits of a data set, and what is counted while they are written.

    elements: (99,) bool, which atomic numbers occur. values: the targets of every written row by split.
    """

    def __init__(self, folder: Path, targets: Sequence[TargetInfo], metadata: dict[str, str]) -> None:
        self.targets = tuple(targets)
        self.splits = {
            name: SplitWriter(folder / name, structure_schema(targets, {**metadata, "crystalformer.split": name}))
            for name in SPLITS
        }
        self.elements = np.zeros(MAX_ATOMIC_NUMBER + 1, dtype=np.bool_)
        self.atoms: list[NDArray[np.int64]] = []
        self._train: list[NDArray[np.float64]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for writer in self.splits.values():
            writer.close()

    def add(self, table: pa.Table, codes: NDArray[np.int8]) -> None:
        """Write the rows of a processed table to the splits of ``codes`` (-1: to none)."""
        for code, name in enumerate(SPLITS):
            chosen = table.filter(pa.array(codes == code))
            if len(chosen) == 0:
                continue
            self.splits[name].add(chosen)
            self._count(chosen)
            if name == "train":
                self._train.append(
                    np.stack([chosen.column(t.name).to_numpy().astype(np.float64) for t in self.targets], axis=1)
                )

    @property
    def train_values(self) -> NDArray[np.float64]:
        """(rows, targets) of the training split, NaN where a target is missing."""
        return np.concatenate(self._train) if self._train else np.zeros((0, len(self.targets)))

    def _count(self, table: pa.Table) -> None:
        offsets, numbers = list_values(table.column("atomic_numbers"))
        self.atoms.append(np.diff(offsets))
        self.elements[np.unique(numbers.to_numpy()[offsets[0] : offsets[-1]])] = True
        for row in table.column("disorder").drop_null().to_pylist():
            self.elements[[entry["atomic_number"] for entry in row]] = True
