"""Splits above the memory limit, in real Ray workers: the same batches as in memory, never more than the limit.

That whole runs from disk draw the same curve is in test_training.py.
"""

import hashlib
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from cluster.data import shells as shells_module
from cluster.data.dealing import global_batches, micro_batches
from cluster.data.feed import Feed, TargetScaling
from cluster.data.shells import SCHEMA, cached_shells, shells_file
from cluster.data.spool import write_table
from cluster.data.tables import BYTES_A_MB, SharedTables, SplitTables, TablesOnDisk, open_split, share
from cluster.session import ray_session
from crystalformer.config import Neighborhood
from data_pipeline.table import StructureTable
from tests.cluster.small import TARGETS

RADIUS = 10.0
AROUND = Neighborhood(RADIUS)
SEED = 7
BATCH = 118
"""8 batches of the 944 training crystals, none left over."""
LIMIT_MB = 64
COPIES = 150


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with ray_session():
        yield


@pytest.fixture(scope="module")
def tables(elastic) -> SplitTables:
    return open_split(elastic, "train", TARGETS, AROUND)


@pytest.fixture(scope="module")
def on_disk(tables) -> TablesOnDisk:
    assert tables.num_bytes > BYTES_A_MB
    shared = share(tables, 1)
    assert isinstance(shared, TablesOnDisk)
    return shared


def open_feed(tables: SplitTables) -> Feed:
    return Feed(tables, TARGETS, RADIUS, TargetScaling(scale=(0.5, 0.5), bias=(1.5, 2.0)))


def prints(feed: Feed, rows: np.ndarray) -> list[str]:
    """A digest of everything the model would see of each crystal."""
    found = []
    for row in rows:
        batch, targets = feed.batch(np.array([row]), torch.device("cpu"))
        distinct = batch.distinct(RADIUS)
        shells = distinct.shells(RADIUS)
        tensors = (batch.positions, batch.atomic_numbers, batch.lattice, targets, distinct.multiplicity, shells.ptr)
        content = b"".join(t.numpy().tobytes() for t in (*tensors, shells.neighbor, shells.distance, shells.count))
        found.append(hashlib.sha256(content).hexdigest())
    return found


@ray.remote(num_cpus=0.2)
def worker_epoch(shared, rank: int, size: int, epoch: int, first: int = 0) -> list[list[str]]:
    """What one of ``size`` workers sees of an epoch's batches from ``first`` on, by batch."""
    feed = open_feed(shared.fetch())
    batches = global_batches(feed.num_rows, BATCH, SEED, epoch)[first:]
    mine = [np.concatenate([part[rank] for part in micro_batches(b, feed.costs, size, 1)]) for b in batches]
    return [prints(feed, rows) for rows in mine]


def seen(shared, size: int, epoch: int, first: int = 0) -> list[Counter]:
    """What all workers together see, by batch."""
    parts = ray.get([worker_epoch.remote(shared, rank, size, epoch, first) for rank in range(size)])
    return [Counter(chain.from_iterable(batch)) for batch in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def every(tables) -> list[str]:
    """The digest of each crystal, as this process reads it."""
    return prints(open_feed(tables), np.arange(len(tables.structures)))


@pytest.fixture(scope="module")
def expected(every):
    """By epoch, the batches that the seed alone decides."""
    return {
        epoch: [Counter(every[row] for row in batch) for batch in global_batches(len(every), BATCH, SEED, epoch)]
        for epoch in (1, 2)
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_structure_once_an_epoch_whatever_the_workers(on_disk, tables, every, expected, size):
    found = seen(on_disk, size, 1)
    assert found == expected[1]
    assert sum(found, Counter()).total() == len(tables.structures)
    assert sum(found, Counter()) == Counter(every)


def test_the_seed_and_epoch_fix_the_order(on_disk, expected):
    assert seen(on_disk, 2, 2) == expected[2] != expected[1]


def test_resuming_goes_on_with_the_next_unseen_batch(on_disk, expected):
    assert seen(on_disk, 2, 1, first=3) == expected[1][3:]


def test_a_split_within_the_limit_lies_in_the_object_store_and_is_the_same(tables, expected):
    shared = share(tables, 4096)
    assert isinstance(shared, SharedTables)
    assert seen(shared, 2, 1) == expected[1]


def test_ray_finds_the_same_shells(elastic, tables, tmp_path, monkeypatch):
    structures = StructureTable.from_arrow(tables.structures)
    starts, found_by_ray = [], shells_module._found_by_ray

    def noted(table, start, around):
        starts.append(start)
        return found_by_ray(table, start, around)

    monkeypatch.setattr(shells_module, "_found_by_ray", noted)
    counted = []
    data = (tmp_path, "train", structures, AROUND, elastic.fingerprint)
    cached_shells(*data, lambda *call: counted.append(call), ray_from=-1.0)
    assert starts == [512]
    assert counted == [("neighbour lists", 512, 944), ("neighbour lists", 944, 944)]
    here, there = (shells_file(folder, "train", AROUND) for folder in (elastic.path, tmp_path))
    assert here.read_bytes() == there.read_bytes()


# Memory ---------------------------------------------------------------------------------------------------------


def resident_mb() -> float:
    """All that is resident in this process: its own memory, mapped files and shared memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


@ray.remote(num_cpus=0.2)
def growth_mb(shared: TablesOnDisk, *, letting_go: bool) -> float:
    """How much a fresh worker grows by in an epoch over a split on disk, at most."""
    torch.ones(1) @ torch.ones(1)
    Feed(shared.fetch(), TARGETS, RADIUS, TargetScaling(scale=(1.0, 1.0), bias=(0.0, 0.0)))
    tables = shared.fetch()
    if not letting_go:
        tables = SplitTables(structures=tables.structures, shells=tables.shells)
    start = peak = resident_mb()
    feed = open_feed(tables)
    for rows in global_batches(feed.num_rows, 64, SEED, 1):
        feed.batch(rows, torch.device("cpu"))
        peak = max(peak, resident_mb())
    return peak - start


@pytest.fixture(scope="module")
def large(tables, tmp_path_factory) -> SplitTables:
    """The training split many times over."""
    folder = tmp_path_factory.mktemp("large")
    files = (folder / "structures.arrow", folder / "shells.arrow")
    for file, table in zip(files, (tables.structures, tables.shells), strict=True):
        write_table(file, SCHEMA if table is tables.shells else table.schema, [table] * COPIES, {})
    opened = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
    return SplitTables(structures=opened[0], shells=opened[1], files=files)


def test_a_worker_never_holds_more_than_the_limit(large):
    assert large.num_bytes > 4 * LIMIT_MB * BYTES_A_MB
    shared = share(large, LIMIT_MB)
    growth = ray.get(growth_mb.options(runtime_env={"env_vars": {"FRESH": "1"}}).remote(shared, letting_go=True))
    assert growth < LIMIT_MB
    holding = ray.get(growth_mb.options(runtime_env={"env_vars": {"FRESH": "2"}}).remote(shared, letting_go=False))
    assert holding > 4 * LIMIT_MB  # the measure sees mapped files
