"""Whole runs of ``crystalformer train``: S1 (workers), S4 (the start), and what S1 means for more workers.

    crystalformer bench scaling [--repeats 3] [--json FILE]

S1: two workers of one thread against one, the same batch a worker. S4: from the command to the first step, against
``import ray, torch, deepspeed`` and ``ray.init``. The rows for more workers are computed from the measured step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cluster.run.report import read_metrics
from tests.benchmarks.measure import Row, environment, report
from tests.benchmarks.options import Parser, out_file, positive

EPOCHS = 24
BATCH = 64
"""Crystals a worker and step."""

YARDSTICK = "import ray, torch, deepspeed; ray.init(address='local', include_dashboard=False, logging_level='ERROR')"
LINK_GBIT = 100.0
"""A stated link speed, for the computed rows."""
LATENCY_S = 20e-6
"""Of one message, for the computed rows."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write JSON where asked."""
    parser = Parser("scaling", __doc__.splitlines()[0])
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each kind, in turn (default 3)")
    parser.add_argument("--json", type=out_file, default=None, help="write the result here as well")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        _train(Path(folder), "warm", workers=1, epochs=1)  # data prepared, files in the page cache
        speeds: dict[int, list[float]] = {1: [], 2: []}
        starts: list[float] = []
        bare: list[float] = []
        for repeat in range(args.repeats):
            for workers in speeds:
                start, rate = _train(Path(folder), f"{workers}-{repeat}", workers=workers, epochs=EPOCHS)
                speeds[workers].append(rate)
                if workers == 1:
                    starts.append(start)
            bare.append(_yardstick())
    rows = [_workers(speeds), _start(starts, bare), *_computed(BATCH / statistics.median(speeds[1]))]
    result = report(rows, environment("cpu"))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _train(folder: Path, name: str, *, workers: int, epochs: int) -> tuple[float, float]:
    """Seconds from the command to the first step, and structures a second (median over epochs after the first)."""
    words = ["train", "--target", "shear", "--run_name", name, "--storage_path", str(folder)]
    words += ["--data_dir", str(folder / "data"), "--epochs", str(epochs), "--batch_size", str(BATCH * workers)]
    words += ["--num_workers", str(workers), "--threads_per_worker", "1", "--cpus_per_worker", "1"]
    began = time.time()
    subprocess.run([sys.executable, "-m", "cluster", *words], check=True, stdout=subprocess.DEVNULL)
    rows = read_metrics(folder / name)
    events = min((folder / name / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime)
    first_row_at = _wall_time_of_first_event(events)
    rates = [row["structures_per_s"] for row in rows]
    return first_row_at - rows[0]["seconds"] - began, statistics.median(rates[1:] or rates)


def _wall_time_of_first_event(file: Path) -> float:
    """When the first epoch's row was recorded."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file.parent))
    events.Reload()
    return float(events.Scalars("train_loss")[0].wall_time)


def _yardstick() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", YARDSTICK], check=True, env={**os.environ, "RAY_AUTH_MODE": "token"})
    return time.perf_counter() - start


def _workers(speeds: dict[int, list[float]]) -> Row:
    one, two = (statistics.median(speeds[workers]) for workers in (1, 2))
    return {"row": "S1", "ours": two, "yardstick": one, "unit": "structures/s", "ratio": two / one, "raw": speeds}


def _start(starts: list[float], bare: list[float]) -> Row:
    ours, theirs = statistics.median(starts), statistics.median(bare)
    raw = {"ours_s": starts, "yardstick_s": bare}
    return {"row": "S4", "ours": ours, "yardstick": theirs, "unit": "s", "ratio": ours / theirs, "raw": raw}


def _computed(step_s: float) -> list[Row]:
    """Efficiency of N workers by this machine's step and a ring all-reduce of the gradients over a stated link."""
    from crystalformer import Crystalformer, ModelConfig

    payload = 4.0 * Crystalformer(ModelConfig()).num_parameters
    rows = []
    for workers in (2, 8, 32, 128, 1000):
        bandwidth = 2.0 * (workers - 1) / workers * payload / (LINK_GBIT / 8 * 1e9)
        reduce_s = bandwidth + 2.0 * (workers - 1) * LATENCY_S
        row: Row = {"row": f"computed, {workers} workers", "ours": reduce_s, "yardstick": step_s, "unit": "s"}
        rows.append(row | {"ratio": step_s / (step_s + reduce_s)})
    return rows


if __name__ == "__main__":
    main()
