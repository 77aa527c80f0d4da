"""The tables of a run: each split's structures and shells, one copy a node, mapped by its workers.

A split up to ``memory_limit_mb`` lies in Ray's object store. A larger one stays on disk, as two Arrow files beside
the prepared data, or in the user's cache folder where that is read-only, which every worker maps: a batch reads its
own rows, the node's page cache holds what fits, and a worker lets go of its pages before they exceed the limit. Both
ways give the same batches in the same order, since the order is a permutation of row numbers (dealing.py) and any row
is found by its offset. Shards of a Ray Data stream would not: they drop rows to even out, reshuffle after a restart,
tie batches to the worker count and, fully shuffled, read about three times fewer rows a second than the map (measured
with Ray 2.60). Ray Data prepares the files instead: structures (data_pipeline/steps/execute.py) and, where they are
many, shells (shells.py).

The price: all nodes must see the data folder where a split exceeds the limit, as they must see the run folder.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.data.shells import (
    RAY_FROM_SECONDS,
    SHELLS_FOLDER,
    Progress,
    cached_shells,
    cached_table,
    shells_file,
    shells_identity,
)
from cluster.data.spool import MappedTable
from cluster.errors import UserError
from crystalformer.config import Neighborhood
from data_pipeline.prepared import PreparedDataset
from data_pipeline.splits import SPLITS as SPLITS
from data_pipeline.table import StructureTable, checked_files, read_pieces

STRUCTURES_FORMAT = "1"
BYTES_A_MB = 10**6
"""As memory is told in elsewhere (machine.py)."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTables:
    """A split's structures and their shells, row for row, rows that lack a target included.

    files: where both lie on disk, if they do. maps: this process's, if it must let go of pages; at most ``limit``
    bytes are to be held then.
    """

    structures: pa.Table
    shells: pa.Table
    files: tuple[Path, Path] | None = None
    maps: tuple[MappedTable, ...] = ()
    limit: int = 0

    @property
    def num_bytes(self) -> int:
        """Of both tables."""
        return int(self.structures.nbytes + self.shells.nbytes)

    def release(self) -> None:
        """Let go of what has been read."""
        for mapped in self.maps:
            mapped.release()


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTables:
    """References to a split's tables in Ray's object store: one copy a node, which its workers map."""

    structures: Any
    shells: Any

    def fetch(self) -> SplitTables:
        """The tables, mapped from the object store."""
        return SplitTables(structures=_joined(self.structures), shells=_joined(self.shells))


@dataclass(frozen=True, kw_only=True, slots=True)
class TablesOnDisk:
    """A split that exceeds the limit (bytes): read from its files as it is used.

    data: the fingerprint that the files name; None where they name none. Files that name none may be of any data.
    """

    structures: Path
    shells: Path
    limit: int
    data: str | None = None

    def fetch(self) -> SplitTables:
        """The tables, mapped from disk. UserError where this node does not see the files, or they are others now."""
        maps = (MappedTable(self.structures), MappedTable(self.shells))
        for path, mapped in zip((self.structures, self.shells), maps, strict=True):
            if self.data is not None and _data_of(mapped.table) not in (None, self.data):
                raise UserError(f"{path}: of other rows than this run began with: its data were prepared anew")
        return SplitTables(structures=maps[0].table, shells=maps[1].table, maps=maps, limit=self.limit)


def _data_of(table: pa.Table) -> str | None:
    """The fingerprint of the prepared data that a table was made from, as its file says."""
    found = (table.schema.metadata or {}).get(b"data")
    return None if found is None else str(found, "utf-8")


def _joined(references: Any) -> pa.Table:  # noqa: ANN401 - a list of Ray's object references
    import ray

    return pa.concat_tables(ray.get(references))


def open_split(
    dataset: PreparedDataset,
    split: str,
    targets: Sequence[str],
    around: Neighborhood,
    progress: Progress | None = None,
    *,
    ray_from: float = RAY_FROM_SECONDS,
) -> SplitTables:
    """A split and its shells, memory-mapped; files are made on first use (``cached_shells``).

    Raises DataError where the split lacks a target or was prepared anew since, UserError where the files cannot be
    written.
    """
    structures = cached_structures(dataset, split, targets)
    everything = StructureTable.from_arrow(structures, (), str(dataset.split_path(split)))
    identity = shells_identity(dataset.fingerprint, everything.num_rows)
    folder = _folder(dataset, shells_file(dataset.path, split, around).name, identity)
    shells = cached_shells(folder, split, everything, around, dataset.fingerprint, progress, ray_from=ray_from)
    files = (structures_file(dataset, split), shells_file(folder, split, around))
    return SplitTables(structures=structures, shells=shells, files=files)


def structures_file(dataset: PreparedDataset, split: str) -> Path:
    """Where ``cached_structures`` keeps a split."""
    name = f"{split}-structures.arrow"
    return _folder(dataset, name, _structures_identity(dataset)) / SHELLS_FOLDER / name


def _structures_identity(dataset: PreparedDataset) -> dict[str, str]:
    return {"format": STRUCTURES_FORMAT, "data": dataset.fingerprint}


def _folder(dataset: PreparedDataset, name: str, identity: Mapping[str, str]) -> Path:
    """The folder below which the Arrow file ``name`` lies: the data set's, or another where that is read-only.

    A file there of another ``identity``, as an earlier version's, is of no use where it cannot be replaced.
    """
    own = dataset.path / SHELLS_FOLDER
    if os.access(own if own.exists() else dataset.path, os.W_OK) or MappedTable.matching(own / name, identity):
        return dataset.path
    return _cache_folder(dataset.path, dataset.fingerprint)


@lru_cache
def _cache_folder(path: Path, fingerprint: str) -> Path:
    """Where the user's programs keep what they can make again; said once a data set, since it takes room there."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(caches) / "crystalformer" / fingerprint[:16]
    _log.warning("%s is read-only: structures and neighbour lists are mapped from %s", path, folder)
    return folder


def cached_structures(dataset: PreparedDataset, split: str, targets: Sequence[str]) -> pa.Table:
    """The Parquet files of a split as one Arrow file beside its shells, memory-mapped. DataError, UserError."""
    folder = dataset.split_path(split)
    files, path = checked_files(folder, targets, dataset.fingerprint), structures_file(dataset, split)
    pieces = read_pieces(folder, fingerprint=dataset.fingerprint)
    return cached_table(path, _structures_identity(dataset), pq.read_schema(files[0]), pieces)


def share(tables: SplitTables | SharedTables | TablesOnDisk, limit_mb: int) -> SharedTables | TablesOnDisk:
    """Put a split into the object store as materialized Ray Data sets, or leave one above the limit on disk.

    Tables that are shared already stay as they are.
    """
    import ray.data

    if not isinstance(tables, SplitTables):
        return tables
    if tables.num_bytes > limit_mb * BYTES_A_MB and tables.files is not None:
        limit, data = limit_mb * BYTES_A_MB, _data_of(tables.structures)
        return TablesOnDisk(structures=tables.files[0], shells=tables.files[1], limit=limit, data=data)
    structures = ray.data.from_arrow(tables.structures)
    shells = ray.data.from_arrow(tables.shells)
    return SharedTables(structures=structures.to_arrow_refs(), shells=shells.to_arrow_refs())
