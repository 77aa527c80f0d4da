"""Speed of the data pipeline: python -m tests.benchmarks.bench_data [--rows 400] [--ray_rows 0] [--json FILE].

D1  structures a second and core, from arrays to a table of primitive cells, against pymatgen's SpacegroupAnalyzer
D2  structures a second gathered into packed batches of 128
Ray seconds of one process and of Ray Data for the same ``--ray_rows`` structures, which is what decides when prepare
    uses Ray (prepare.RAY_FROM_SECONDS)
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.crystal import Crystal, read_crystals, structure_columns
from data_pipeline.datasets import embedded_names, find_dataset
from data_pipeline.info import DatasetInfo
from data_pipeline.prepare import prepare_from
from data_pipeline.raw import Record, from_structures, raw_tables
from data_pipeline.sources.base import ARRAY_SECONDS
from data_pipeline.sources.embedded import FOLDER
from data_pipeline.table import StructureTable
from data_pipeline.work import process_batch

REPEATS = 3


def best(function: Callable[[], object]) -> float:
    """Seconds of the fastest of a few calls."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


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


def bench_reduction(name: str, rows: int) -> dict[str, object]:
    """D1 on a random sample of an embedded set."""
    table = pq.read_table(FOLDER / f"{name}.parquet")
    chosen = np.random.default_rng(0).choice(len(table), min(rows, len(table)), replace=False)
    sample = table.take(pa.array(chosen)).combine_chunks()
    raw = from_structures(sample, name, find_dataset(name).targets)
    crystals = read_crystals(sample)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = best(lambda: process_batch(raw)), best(lambda: pymatgen_route(crystals))
    return {
        "what": f"D1 prepare {name}",
        "rows": len(chosen),
        "per_second": round(len(chosen) / ours),
        "peer_per_second": round(len(chosen) / theirs),
        "ratio": round(theirs / ours, 1),
    }


def bench_gather(name: str, batch: int = 128) -> dict[str, object]:
    """D2: random batches of an embedded set."""
    table = StructureTable.from_arrow(pq.read_table(FOLDER / f"{name}.parquet"), find_dataset(name).target_names)
    order = np.random.default_rng(0).permutation(table.num_rows)
    batches = [order[i : i + batch] for i in range(0, len(order) - batch + 1, batch)]

    def epoch() -> None:
        for rows in batches:
            table.gather(rows)
            table.targets(rows)

    rate = len(batches) * batch / best(epoch)
    return {"what": f"D2 gather {name}, batch {batch}", "rows": len(order), "per_second": round(rate)}


class _Repeated:
    """An embedded set again and again, every copy with its own ids and slightly stretched cells."""

    every_target = True
    seconds_per_row = ARRAY_SECONDS

    def __init__(self, info: DatasetInfo, rows: int) -> None:
        self.targets = info.targets
        self._rows = rows
        table = pq.read_table(FOLDER / f"{info.name}.parquet")
        self._crystals = read_crystals(table)
        self._values = list(zip(*(table[t.name].to_pylist() for t in info.targets), strict=True))

    def fingerprint(self) -> str:
        return f"synthetic {self._rows}"

    def tables(self) -> Iterator[pa.Table]:
        return raw_tables((self._record(i) for i in range(self._rows)), self.targets)

    def _record(self, i: int) -> Record:
        copy, base = divmod(i, len(self._crystals))
        crystal, stretch = self._crystals[base], 1 + 1e-4 * copy
        stretched = replace(crystal, lattice=crystal.lattice * stretch, positions=crystal.positions * stretch)
        return Record(file="synthetic", row=i, material_id=f"x{i}", crystal=stretched, targets=self._values[base])


def bench_ray(rows: int) -> list[dict[str, object]]:
    """The same preparation by one process and by Ray Data."""
    info = find_dataset("flla_2015")
    source = _Repeated(info, rows)
    made = []
    for executor in ("process", "ray"):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            prepare_from(source, replace(info, expected=None), Path(folder), executor=executor)  # type: ignore[arg-type]
            seconds = time.perf_counter() - start
        made.append({"what": f"prepare by {executor}", "rows": rows, "seconds": round(seconds, 1)})
        made[-1]["per_second"] = round(rows / seconds)
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="sample of each set for D1 (default 400)")
    parser.add_argument("--ray_rows", type=int, default=0, help="rows of the comparison with Ray (default: none)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    args = parser.parse_args()
    figures = [bench_reduction(name, args.rows) for name in embedded_names()]
    ratio = statistics.geometric_mean(float(str(figure["ratio"])) for figure in figures)
    figures.append({"what": "D1 geometric mean of the ratios (target 8)", "ratio": round(ratio, 1)})
    figures += [bench_gather(name) for name in embedded_names()]
    figures += bench_ray(args.ray_rows) if args.ray_rows else []
    for figure in figures:
        numbers = "  ".join(f"{key} {value}" for key, value in figure.items() if key != "what")
        sys.stdout.write(f"{figure['what']:45} {numbers}\n")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
