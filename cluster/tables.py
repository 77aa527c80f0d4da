"""The tables of a run: each split's structures and shells, prepared on the driver and shared through Ray's store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster.shells import cached_shells
from data_pipeline.prepared import PreparedDataset
from data_pipeline.table import StructureTable, read_table

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitTables:
    """A split's structures and their shells, row for row; every row has every target."""

    structures: pa.Table
    shells: pa.Table


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTables:
    """References to a split's tables: one copy a node, which its workers map."""

    structures: Any
    shells: Any

    def fetch(self) -> SplitTables:
        """The tables, mapped from the object store."""

        return SplitTables(structures=_joined(self.structures), shells=_joined(self.shells))


def _joined(references: Any) -> pa.Table:  # noqa: ANN401 - a list of Ray's object references
    import ray

    return pa.concat_tables(ray.get(references))


def open_split(dataset: PreparedDataset, split: str, targets: tuple[str, ...], radius: float) -> SplitTables:
    """Read a split and find (or read) its shells within ``radius`` Å; rows that lack a target are left out."""
    structures = read_table(dataset.split_path(split), targets)
    everything = StructureTable.from_arrow(structures, (), str(dataset.split_path(split)))
    shells = cached_shells(dataset.path, split, everything, radius, dataset.fingerprint)
    complete = np.ones(len(structures), dtype=bool)
    for target in targets:
        complete &= pc.fill_null(pc.is_finite(structures.column(target)), False).to_numpy(zero_copy_only=False)  # noqa: FBT003
    if complete.all():
        return SplitTables(structures=structures, shells=shells)
    rows = pa.array(np.flatnonzero(complete))
    return SplitTables(structures=structures.take(rows), shells=shells.take(rows))


def share(tables: SplitTables) -> SharedTables:
    """Put a split into the object store as materialized Ray Data sets."""
    import ray.data

    structures = ray.data.from_arrow(tables.structures)
    shells = ray.data.from_arrow(tables.shells)
    return SharedTables(structures=structures.to_arrow_refs(), shells=shells.to_arrow_refs())
