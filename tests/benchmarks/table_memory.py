"""D3: the memory of a training table that several processes of a node read, against that with one reader."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import ray
import torch

from cluster.data.dealing import global_batches
from cluster.data.feed import Feed, TargetScaling
from cluster.data.shells import SCHEMA
from cluster.data.spool import write_table
from cluster.data.tables import SharedTables, SplitTables, TablesOnDisk, open_split, share
from cluster.session import ray_session
from crystalformer.config import ModelConfig
from data_pipeline.prepare import prepare_dataset
from tests.benchmarks.measure import Row
from tests.benchmarks.memory import pss_mb

DATASET = "elastic_tensor_2015"
COPIES = 80
"""The training split so many times over: a table that stands out of what processes allocate anyway."""

RADIUS = ModelConfig().neighbor_radius
ATOMS = 12


@ray.remote(num_cpus=0.1)
class Reader:
    """A process that reads tables as a training worker does."""

    def read(self, shared: SharedTables | TablesOnDisk) -> int:
        """Make every batch of an epoch and keep the table open; the number of crystals."""
        self._feed = Feed(shared.fetch(), ("shear",), RADIUS, TargetScaling(scale=(1.0,), bias=(0.0,)))
        for rows in global_batches(self._feed.num_rows, 32, 0, 1):
            self._feed.batch(rows, torch.device("cpu"))
        return self._feed.num_rows


def measure(folder: Path, readers: int) -> list[Row]:
    """Sum of the proportional set sizes of all processes, above that of the same processes before the table."""
    prepared = prepare_dataset(DATASET, folder)
    small = open_split(prepared, "val", ("shear",), ModelConfig().neighborhood)
    files = (folder / "structures.arrow", folder / "shells.arrow")
    train = open_split(prepared, "train", ("shear",), ModelConfig().neighborhood)
    write_table(files[0], train.structures.schema, [train.structures] * COPIES, {})
    write_table(files[1], SCHEMA, [train.shells] * COPIES, {})
    with ray_session():
        actors = [Reader.remote() for _ in range(readers)]  # type: ignore[attr-defined]  # made by ray.remote
        warm = share(small, 4096)
        ray.get([actor.read.remote(warm) for actor in actors])
        before = pss_mb()
        shared, size_mb = _shared(files)
        rows = ray.get(actors[0].read.remote(shared))
        one = pss_mb() - before
        ray.get([actor.read.remote(shared) for actor in actors[1:]])
        every = pss_mb() - before
    structures, shells = train.structures.nbytes / len(train.structures), train.shells.nbytes / len(train.shells)
    atoms = len(train.structures.column("positions").chunk(0).values) / len(train.structures)
    row: Row = {"row": "D3", "what": f"memory with {readers} readers over that with one (target 1.1)", "rows": rows}
    row |= {"table_mb": size_mb, "one_mb": one, "all_mb": every, "ratio": every / one}
    per: Row = {"row": "D3", "what": f"bytes a structure of {ATOMS} atoms (target 2,048)", "rows": rows}
    return [row, per | {"bytes_a_row": structures / atoms * ATOMS, "lists_bytes_a_row": shells / atoms * ATOMS}]


def _shared(files: tuple[Path, Path]) -> tuple[SharedTables | TablesOnDisk, float]:
    """The table in the object store; the driver's own map of the files is gone afterwards."""
    opened = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    tables = SplitTables(structures=opened[0], shells=opened[1])
    return share(tables, 4096), tables.num_bytes / 2**20
