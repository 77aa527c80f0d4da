"""The data of all trials, prepared once: structures in the object store, neighbour lists found for few radii.

A run needs its neighbours within a radius that follows from scale_real, gauss_lb_real and cutoff_sigmas, so nearly
every trial needs another one. Lists within a larger radius hold those within a smaller one, in the same order:
the library finds them for radii that grow by ``STEP`` from the radius of the settings as given, whose lists
``crystalformer train`` uses as well, keeps them on disk beside the data for this and every later search, and cuts
them to a trial's own radius. A trial's tables are then the very ones that ``train`` would use, but where only
the larger radius tells two atoms of a crystal apart: then both are computed, with the same result.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from cluster.data.feed import TargetScaling
from cluster.data.shells import SCHEMA, flatten, list_column
from cluster.data.tables import BYTES_A_MB, SharedTables, SplitTables, TablesOnDisk, open_split, share
from crystalformer.config import Neighborhood
from data_pipeline.prepared import PreparedDataset
from data_pipeline.table import StructureTable

TRIAL_SPLITS = ("train", "val")
"""A trial looks at these; the test split is for the training that follows."""

STEP = 1.25
"""A list holds up to this many times the radius that is needed: at most twice the images."""

KEPT = 4
"""Radii whose cut lists stay in the object store after the trials that used them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialData:
    """What the library hands to a trial."""

    tables: dict[str, SharedTables | TablesOnDisk]
    radius: float
    """Å, of the lists: the trial's, or larger where they are read from disk."""
    scaling: TargetScaling


def grid_radius(radius: float, base: float) -> float:
    """The smallest base * STEP^k (k may be negative) that is at least ``radius`` (Å)."""
    if radius <= 0 or base <= 0:
        return max(radius, 0.0)
    power = math.ceil(math.log(radius / base) / math.log(STEP) - 1e-9)
    found = base * STEP**power
    return found if found >= radius else radius


def within(shells: pa.Table, radius: float) -> pa.Table:
    """The lists cut to ``radius`` (Å): the shells no farther, in their order."""
    rows, atoms = flatten(shells.column("rows_an_atom"))
    starts, distance = flatten(shells.column("distance"))
    keep = distance <= np.float32(radius)
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    per_atom = np.diff(kept_before[np.concatenate([[0], np.cumsum(atoms)])])
    columns = [list_column(rows, per_atom, pa.int32())]
    for name in ("neighbor", "distance", "count"):
        _, values = flatten(shells.column(name))
        columns.append(list_column(kept_before[starts], values[keep], SCHEMA.field(name).type.value_type))
    atoms_as_they_are = [shells.column(name) for name in ("atom", "multiplicity")]
    return pa.Table.from_arrays([*columns, *atoms_as_they_are], schema=SCHEMA)


class Tables:
    """The library itself; ``Library`` is the actor around it. Threads may call it at once."""

    def __init__(self, dataset: PreparedDataset, targets: tuple[str, ...], base_radius: float, limit_mb: int) -> None:
        """``base_radius``: Å, of the settings as given. ``limit_mb``: a split above it is read from disk."""
        self._dataset, self._targets, self._limit_mb = dataset, targets, limit_mb
        self._base_radius = base_radius
        self._opened: dict[Neighborhood, dict[str, SplitTables]] = {}
        self._shared: OrderedDict[Neighborhood, dict[str, SharedTables | TablesOnDisk]] = OrderedDict()
        self._structures: dict[str, Any] = {}
        self._locks: dict[Neighborhood, threading.Lock] = {}
        self._lock = threading.Lock()
        self._scalings: dict[str, TargetScaling] = {}
        self.requests, self.found = 0, 0

    def data(self, around: Neighborhood, normalize: str) -> TrialData:
        """Everything for a trial that looks at that ``around`` its atoms and normalizes targets in that way."""
        radius = around.radius
        opened, found = self._open(around._replace(radius=grid_radius(radius, self._base_radius)))
        with self._lock:
            self.requests += 1
            self.found += found
            tables, whole = self._cut(opened, around)
            scaling = self._scaling(opened["train"], normalize)
        reach = grid_radius(radius, self._base_radius) if whole else radius
        return TrialData(tables=tables, radius=reach, scaling=scaling)

    def _open(self, around: Neighborhood) -> tuple[dict[str, SplitTables], bool]:
        """The splits with their lists within a radius of the grid, and whether they had to be found just now."""
        with self._lock:
            lock = self._locks.setdefault(around, threading.Lock())
        with lock:
            if around in self._opened:
                return self._opened[around], False
            found = threading.Event()  # progress is not called for lists that lie there already

            def note(_what: str, _done: int, _total: int) -> None:
                found.set()

            # Trials hold the cluster's CPUs while they wait for this, so Ray Data's tasks would never get one.
            opened = {
                split: open_split(self._dataset, split, self._targets, around, note, ray_from=math.inf)
                for split in TRIAL_SPLITS
            }
            self._opened[around] = opened
            return opened, found.is_set()

    def _cut(
        self, opened: dict[str, SplitTables], around: Neighborhood
    ) -> tuple[dict[str, SharedTables | TablesOnDisk], bool]:
        """The splits cut to the radius and shared; or, above the limit, whole and on disk."""
        if around in self._shared:
            self._shared.move_to_end(around)
            return self._shared[around], False
        if any(tables.num_bytes > self._limit_mb * BYTES_A_MB for tables in opened.values()):
            return {split: share(tables, self._limit_mb) for split, tables in opened.items()}, True
        shared: dict[str, SharedTables | TablesOnDisk] = {}
        for split, tables in opened.items():
            if split not in self._structures:
                self._structures[split] = [ray.put(tables.structures)]
            shells = within(tables.shells, around.radius) if around.radius > 0 else tables.shells
            shared[split] = SharedTables(structures=self._structures[split], shells=[ray.put(shells)])
        self._shared[around] = shared
        while len(self._shared) > KEPT:
            self._shared.popitem(last=False)
        return shared, False

    def _scaling(self, train: SplitTables, normalize: str) -> TargetScaling:
        if normalize not in self._scalings:
            values = StructureTable.from_arrow(train.structures, self._targets).targets()
            self._scalings[normalize] = TargetScaling.fit(values, normalize)
        return self._scalings[normalize]

    def counts(self) -> tuple[int, int]:
        """Requests so far, and how many of them had to wait for lists to be found."""
        return self.requests, self.found


@ray.remote(num_cpus=0, max_concurrency=16, concurrency_groups={"end": 1})
class Library(Tables):
    """The library as an actor beside the driver, which sees the data folder.

    All trials know it, so it passes on to them that the search ends; at once, however many wait for their data.
    """

    _ending = False

    @ray.method(concurrency_group="end")
    def end(self) -> None:
        """Wish that trials write a checkpoint and end."""
        self._ending = True

    @ray.method(concurrency_group="end")
    def ending(self) -> bool:
        """Whether ``end`` was called."""
        return self._ending
