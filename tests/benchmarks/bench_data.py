"""Data: rows D1, D2, D3 and S3 of the design's targets, and tables of any length.

    crystalformer bench data [--rows D1,D2,D3,S3] [--sample 400] [--cif_rows N] [--readers 8]
                             [--synthetic N] [--executor auto]

D1  structures a second and core, from arrays to a table of primitive cells, against pymatgen's SpacegroupAnalyzer;
    with --cif_rows also N CIF texts of a CSV file, by one process and by Ray Data: seconds, cores busy (cif_texts.py)
D2  structures a second made into batches as training does: structures gathered, lists packed, collated; by the clock
    and by the thread's CPU time, beside one training step on the same crystals and the copying that cannot be avoided
D3  memory of all processes together with N readers of one table, against that with one; bytes a structure
S3  work of the busiest worker over the mean, 8 workers, batch 256: dealt by cost, and round-robin
synthetic  a made-up table of N structures: prepared, listed and iterated (synthetic.py)
"""

from __future__ import annotations

import json
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cluster.data.dealing import global_batches, micro_batches
from cluster.data.feed import Feed, TargetScaling
from cluster.data.tables import open_split
from crystalformer.config import ModelConfig
from data_pipeline.crystal import Crystal, read_crystals, structure_columns
from data_pipeline.datasets import embedded_names, find_dataset
from data_pipeline.prepare import prepare_dataset
from data_pipeline.sources.embedded import FOLDER
from data_pipeline.sources.raw import from_structures
from data_pipeline.steps.work import process_batch
from tests.benchmarks import cif_texts, synthetic, table_memory
from tests.benchmarks.bench_step import training_step
from tests.benchmarks.measure import Row, environment, report, timing
from tests.benchmarks.options import Parser, natural, out_file, positive, some_of

DATASET = "elastic_tensor_2015"
RADIUS = ModelConfig().neighbor_radius
REPEATS = 9
WORKERS = 8
CPU = torch.device("cpu")


def pymatgen_route(crystals: list[Crystal]) -> list[pa.Array]:
    """What a program does without this package: a Structure, its primitive cell, and the arrays of that."""
    from pymatgen.core import Structure
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    found = []
    for crystal in crystals:
        structure = Structure(crystal.lattice, crystal.atomic_numbers, crystal.positions, coords_are_cartesian=True)
        small = SpacegroupAnalyzer(structure).find_primitive()
        found.append(
            Crystal(
                positions=small.cart_coords,
                atomic_numbers=np.array(small.atomic_numbers, dtype=np.int64),
                lattice=small.lattice.matrix,
            )
        )
    return structure_columns(found)


def preparing(sample: int) -> list[Row]:
    """D1 on a random sample of each embedded set."""
    rows = []
    for name in embedded_names():
        table = pq.read_table(FOLDER / f"{name}.parquet")
        chosen = np.random.default_rng(0).choice(len(table), min(sample, len(table)), replace=False)
        some = table.take(pa.array(chosen)).combine_chunks()
        raw, crystals = from_structures(some, name, find_dataset(name).targets), read_crystals(some)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ours = timing(lambda raw=raw: process_batch(raw), 3, "cpu")
            theirs = timing(lambda crystals=crystals: pymatgen_route(crystals), 1, "cpu", warmup=0)
        row: Row = {
            "row": "D1",
            "what": f"prepare {name}",
            "rows": len(chosen),
            "per_second": len(chosen) / ours.wall,
        }
        rows.append(row | {"peer_per_second": len(chosen) / theirs.wall, "ratio": theirs.cpu / ours.cpu})
    mean = statistics.geometric_mean(row["ratio"] for row in rows)
    return [*rows, {"row": "D1", "what": "geometric mean (target 8)", "ratio": mean}]


def open_feed(data_dir: Path) -> Feed:
    """The training split of the set that S3 and D2 are about, at the default model's radius."""
    prepared = prepare_dataset(DATASET, data_dir)
    tables = open_split(prepared, "train", ("shear",), ModelConfig().neighborhood)
    return Feed(tables, ("shear",), RADIUS, TargetScaling(scale=(1.0,), bias=(0.0,)))


def batches(feed: Feed) -> list[Row]:
    """D2: batch making on one thread, an epoch at a time."""
    torch.set_num_threads(1)
    size = 128
    epoch = global_batches(feed.num_rows, size, 0, 1)

    def make_all() -> None:
        for rows in epoch:
            feed.batch(rows, CPU)

    made = timing(make_all, REPEATS, "cpu")
    _, step = training_step(feed.batch(epoch[0], CPU)[0], "auto")
    step_time = timing(step, 3, "cpu")
    count = len(epoch) * size
    share = made.cpu / len(epoch) / step_time.cpu
    row: Row = {"row": "D2", "what": f"batches of {size}, {DATASET} (target 100,000 a second)", "rows": count}
    row |= {
        "per_second": count / made.wall,
        "per_cpu_second": count / made.cpu,
        "best_per_second": count / min(made.raw),
    }
    floor = _copying(feed, count)
    row |= {"copy_per_cpu_second": count / floor, "of_copying": floor / made.cpu, "raw": made.raw}
    step_row: Row = {"row": "D2", "what": f"share of a training step of {size}, 1 thread (target 0.02)"}
    return [row, step_row | {"share": share, "step_s": step_time.wall, "step_cpu_s": step_time.cpu}]


def _copying(feed: Feed, count: int) -> float:
    """CPU seconds to copy as many bytes as ``count`` crystals' lists hold in a batch, a batch's worth at a time."""
    entries = int(feed.shells.mean() * 128)
    source = [np.ones(entries, kind) for kind in (np.int64, np.float32, np.int16)]

    def copy() -> None:
        for array in source:
            array.copy()

    return timing(copy, 200, "cpu").cpu * count / 128


def imbalance(feed: Feed) -> list[Row]:
    """S3 over 20 epochs, in the work of a step: shells and atoms, as ShellTable.costs weighs them."""
    dealt, naive, least, shells = [], [], [], []
    for epoch in range(1, 21):
        for batch in global_batches(feed.num_rows, 256, 0, epoch):
            costs = feed.costs[batch]
            least.append(max(1.0, WORKERS * float(costs.max()) / float(costs.sum())))
            (parts,) = micro_batches(batch, feed.costs, WORKERS, 1)
            for kept, shares in ((dealt, parts), (naive, [batch[i::WORKERS] for i in range(WORKERS)])):
                loads = [int(feed.costs[rows].sum()) for rows in shares]
                kept.append(max(loads) / statistics.mean(loads))
            listed = [int(feed.shells[rows].sum()) for rows in parts]
            shells.append(max(listed) / statistics.mean(listed))
    row: Row = {"row": "S3", "what": f"busiest of {WORKERS} workers over the mean, batch 256 (target 1.05)"}
    row |= {"rows": feed.num_rows, "steps": len(dealt), "mean": statistics.mean(dealt), "worst": max(dealt)}
    row |= {"least_possible": statistics.mean(least), "least_possible_worst": max(least)}
    row |= {"shells_alone_mean": statistics.mean(shells)}
    return [row | {"round_robin_mean": statistics.mean(naive), "round_robin_worst": max(naive)}]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the rows asked for, print and return them."""
    parser = Parser("data", "Data: speed, memory, balance")
    parser.add_argument(
        "--rows",
        type=some_of("D1", "D2", "D3", "S3"),
        default="D1,D2,D3,S3",
        help="which of D1, D2, D3, S3; may be empty",
    )
    parser.add_argument("--sample", type=positive, default=400, help="structures of each set for D1")
    parser.add_argument(
        "--cif_rows", type=natural, default=0, metavar="N", help="CIF texts prepared by one process and Ray"
    )
    parser.add_argument("--readers", type=positive, default=8, help="processes that read the table of D3")
    parser.add_argument("--synthetic", type=natural, default=0, metavar="N", help="structures of a made-up table")
    parser.add_argument("--radius", type=float, default=synthetic.RADIUS, help="of its neighbour lists, Å")
    parser.add_argument("--executor", choices=("auto", "process", "ray"), default="auto", help="what prepares it")
    parser.add_argument("--json", type=out_file, help="also write the figures there")
    options = parser.parse_args(arguments)
    wanted, found = options.rows, []
    setting = environment("cpu")
    with tempfile.TemporaryDirectory(prefix="crystalformer-bench-") as folder:
        feed = open_feed(Path(folder)) if {"D2", "S3"} & set(wanted) else None
        found += preparing(options.sample) if "D1" in wanted else []
        found += imbalance(feed) if "S3" in wanted and feed is not None else []
        found += table_memory.measure(Path(folder), options.readers) if "D3" in wanted else []
        found += batches(feed) if "D2" in wanted and feed is not None else []
    found += cif_texts.measure(options.cif_rows) if options.cif_rows else []
    found += synthetic.measure(options.synthetic, options.executor, options.radius) if options.synthetic else []
    result = report(found, setting)
    if options.json is not None:
        options.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
