"""Preparing CIF texts through Ray Data and in one process: rows a second, cores busy, and the same bytes from both.

The source is a CSV file with a cif column, of the embedded crystals over and over, as a user would bring it.
"""

from __future__ import annotations

import csv
import hashlib
import os
import tempfile
import threading
import time
from itertools import chain, cycle, islice
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow.parquet as pq

from data_pipeline.crystal import read_crystals
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.prepare import Executor
from data_pipeline.sources.embedded import FOLDER
from tests.benchmarks.measure import Row
from tests.benchmarks.memory import PROC, family

TICKS = os.sysconf("SC_CLK_TCK")


class CpuTime:
    """Within, the CPU seconds of this process and of all it starts, sampled: ``seconds``.

    The kernel adds up only children that were waited for, and Ray's workers are nobody's by then.
    """

    def __init__(self, every: float = 0.2) -> None:
        self.seconds = 0.0
        self._every, self._done = every, threading.Event()
        self._used: dict[int, float] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._before = _cpu_seconds(os.getpid())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        self.seconds = sum(self._used.values()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(self._every):
            self._sample()

    def _sample(self) -> None:
        for process in family():
            self._used[process] = max(self._used.get(process, 0.0), _cpu_seconds(process))


def _cpu_seconds(process: int) -> float:
    """User and system time of a process; 0 once it has ended."""
    try:
        after_name = (PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / TICKS


def write_cif_table(path: Path, rows: int) -> None:
    """A CSV file of ``rows`` CIF texts with an id and a target each."""
    from pymatgen.core import Structure

    tables = (pq.read_table(file) for file in sorted(FOLDER.glob("*.parquet")))
    crystals = (c for c in chain.from_iterable(map(read_crystals, tables)) if c.disorder is None)
    texts = [
        Structure(c.lattice, c.atomic_numbers, c.positions, coords_are_cartesian=True).to(fmt="cif")
        for c in islice(crystals, rows)
    ]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "made_up (eV)", "cif"])
        writer.writerows((f"x{i}", i, text) for i, text in enumerate(islice(cycle(texts), rows)))


def measure(rows: int) -> list[Row]:
    """A row of figures each for one process and for Ray Data. Raises RuntimeError where their files differ."""
    found, contents = [], set()
    with tempfile.TemporaryDirectory(prefix="crystalformer-bench-") as folder:
        source = Path(folder) / "cifs.csv"
        write_cif_table(source, rows)
        executors: tuple[Executor, ...] = ("process", "ray")
        for executor in executors:
            start = time.perf_counter()
            with CpuTime() as cpu:
                own = OwnData(path=source, name="cifs")
                prepared = prepare_source(own, Path(folder) / executor, executor=executor)
            seconds = time.perf_counter() - start
            files = sorted(file for file in prepared.path.rglob("*") if file.is_file())
            contents.add(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
            row: Row = {"row": "D1", "what": f"prepare a CSV of CIF texts by {executor}", "rows": rows}
            row |= {"seconds": seconds, "per_second": rows / seconds}
            found.append(row | {"cpu_s": cpu.seconds, "cores_busy": cpu.seconds / seconds})
    if len(contents) > 1:
        raise RuntimeError("one process and Ray Data wrote different files")
    found[1]["ratio"] = found[0]["seconds"] / found[1]["seconds"]
    return found
