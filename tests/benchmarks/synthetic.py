"""A structure table of any length: supercells of the embedded crystals with randomly substituted atoms.

prepare  structures a second from arrays to Parquet (validated, reduced, split), peak memory of all processes
lists    neighbour lists a second, within RADIUS
iterate  structures a second of one shuffled epoch read from disk, at most LIMIT_MB of it held
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.data.dealing import global_batches
from cluster.data.feed import Feed, TargetScaling
from cluster.data.tables import BYTES_A_MB, TablesOnDisk, open_split, structures_file
from crystalformer.config import Neighborhood
from data_pipeline.crystal import Crystal, read_crystals
from data_pipeline.info import DatasetInfo, SourceKind, TargetInfo
from data_pipeline.prepare import Executor, prepare_from
from data_pipeline.sources.base import ARRAY_SECONDS
from data_pipeline.sources.embedded import FOLDER
from data_pipeline.sources.raw import Record, raw_tables
from tests.benchmarks.measure import Row
from tests.benchmarks.memory import Peak, resident_mb

RADIUS = 3.5
"""Å, unless told otherwise. Lists within the default model's 11.9 Å take some 2 ms a crystal: no subject here."""

LIMIT_MB = 256
BATCH = 256
TARGET = TargetInfo(name="made_up", unit="eV", description="a function of the row's number")
REPEATS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2), (3, 1, 1))
LARGEST = 24
"""Atoms of a supercell at most, unless the crystal itself has more."""


class SyntheticSource:
    """``rows`` crystals, a function of their number alone."""

    every_target = True
    seconds_per_row = ARRAY_SECONDS

    def __init__(self, rows: int) -> None:
        self.targets = (TARGET,)
        self._rows = rows
        tables = [pq.read_table(file) for file in sorted(FOLDER.glob("*.parquet"))]
        every = [crystal for table in tables for crystal in read_crystals(table)]
        self._crystals = [crystal for crystal in every if crystal.disorder is None]
        self._made: dict[tuple[int, tuple[int, int, int]], Crystal] = {}

    def fingerprint(self) -> str:
        return f"synthetic {self._rows}"

    def tables(self) -> Iterator[pa.Table]:
        return raw_tables((self._record(i) for i in range(self._rows)), self.targets)

    def _record(self, i: int) -> Record:
        rng = np.random.default_rng(i)
        chosen = int(rng.integers(len(self._crystals)))
        crystal = self._crystals[chosen]
        fitting = [r for r in REPEATS if r[0] * r[1] * r[2] * len(crystal.positions) <= LARGEST] or [(1, 1, 1)]
        made = _substituted(self._supercell(chosen, fitting[int(rng.integers(len(fitting)))]), rng)
        return Record(file="synthetic", row=i, material_id=f"x{i}", crystal=made, targets=(float(np.sin(i)),))

    def _supercell(self, crystal: int, repeats: tuple[int, int, int]) -> Crystal:
        key = (crystal, repeats)
        if key not in self._made:
            self._made[key] = _supercell(self._crystals[crystal], repeats)
        return self._made[key]


def _supercell(crystal: Crystal, repeats: tuple[int, int, int]) -> Crystal:
    cells = np.stack(np.meshgrid(*(np.arange(r) for r in repeats), indexing="ij"), -1).reshape(-1, 3)
    positions = (crystal.positions[None] + (cells @ crystal.lattice)[:, None]).reshape(-1, 3)
    numbers = np.tile(crystal.atomic_numbers, len(cells))
    lattice = crystal.lattice * np.array(repeats)[:, None]
    return replace(crystal, positions=positions, atomic_numbers=numbers, lattice=lattice)


def _substituted(crystal: Crystal, rng: np.random.Generator) -> Crystal:
    """A fifth of the atoms, at least one, become another element."""
    numbers = crystal.atomic_numbers.copy()
    chosen = rng.choice(len(numbers), max(1, len(numbers) // 5), replace=False)
    numbers[chosen] = rng.integers(1, 90, len(chosen))
    return replace(crystal, atomic_numbers=numbers)


def measure(rows: int, executor: Executor, radius: float = RADIUS) -> list[Row]:
    """Make the table in a temporary folder, find its lists, iterate it once; a row of figures each."""
    info = DatasetInfo(
        name="synthetic", kind=SourceKind.OWN, targets=(TARGET,), source="made up", citation="", licence=""
    )
    with tempfile.TemporaryDirectory(prefix="crystalformer-bench-") as folder:
        with Peak() as peak:
            start = time.perf_counter()
            prepared = prepare_from(SyntheticSource(rows), info, Path(folder), executor=executor)
            seconds = time.perf_counter() - start
        disk = sum(file.stat().st_size for file in prepared.path.rglob("*.parquet"))
        made = [_row(f"prepare by {executor}", rows, seconds, peak.mb) | {"bytes_a_row": disk / rows}]
        with Peak() as peak:
            start = time.perf_counter()
            tables = open_split(prepared, "train", (TARGET.name,), Neighborhood(radius))
            seconds = time.perf_counter() - start
        train = len(tables.structures)
        made.append(
            _row(f"lists within {radius} Å", train, seconds, peak.mb) | {"bytes_a_row": tables.shells.nbytes / train}
        )
        files = (structures_file(prepared, "train"), tables.files[1] if tables.files else Path())
        on_disk = TablesOnDisk(structures=files[0], shells=files[1], limit=LIMIT_MB * BYTES_A_MB)
        made.append(_iterated(on_disk, radius))
    return made


def _iterated(shared: TablesOnDisk, radius: float) -> Row:
    before = peak = resident_mb()
    tables = shared.fetch()
    feed = Feed(tables, (TARGET.name,), radius, TargetScaling(scale=(1.0,), bias=(0.0,)))
    start, start_cpu = time.perf_counter(), time.process_time()
    for rows in global_batches(feed.num_rows, BATCH, 0, 1):
        feed.batch(rows, torch.device("cpu"))
        peak = max(peak, resident_mb())
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    row = _row(f"iterate, limit {LIMIT_MB} MB", feed.num_rows, seconds, peak)
    row |= {"bytes_a_row": tables.structures.nbytes / feed.num_rows, "per_cpu_second": feed.num_rows / cpu}
    return row | {"grown_mb": peak - before}


def _row(what: str, rows: int, seconds: float, peak_mb: float) -> Row:
    """The figures of a phase, told as soon as it is over: a large table takes minutes."""
    sys.stderr.write(f"{what}: {rows} rows, {seconds:.1f} s, at most {peak_mb:.0f} MB\n")
    row: Row = {"row": "synthetic", "what": what, "rows": rows, "seconds": seconds}
    return row | {"per_second": rows / seconds, "peak_mb": peak_mb}
