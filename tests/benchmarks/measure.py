"""What the benchmarks share: medians over repeats, the machine's matrix-product rate, tables and JSON."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

Row = dict[str, Any]


class Timing(NamedTuple):
    """Seconds of one call: medians of the wall clock and of the calling thread's CPU time, and all wall times."""

    wall: float
    cpu: float
    raw: list[float]


def timing(call: Callable[[], object], repeats: int, device: str, warmup: int = 1) -> Timing:
    """Time ``call``. On a shared machine the CPU time wanders less; with one thread it is the work itself."""
    for _ in range(warmup):
        call()
    wall, cpu = [], []
    for _ in range(repeats):
        _synchronize(device)
        start, start_cpu = time.perf_counter(), time.thread_time()
        call()
        _synchronize(device)
        wall.append(time.perf_counter() - start)
        cpu.append(time.thread_time() - start_cpu)
    return Timing(statistics.median(wall), statistics.median(cpu), wall)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def product_rate(device: str, size: int = 1024, repeats: int = 10) -> float:
    """Floating-point operations a second of a float32 matrix product of ``size``³; best of ``repeats``."""
    a = torch.rand(size, size, device=device)
    result = timing(lambda: a @ a, repeats, device)
    return 2.0 * size**3 / min(result.raw)


def environment(device: str) -> Row:
    """Date, machine and versions."""
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu_name()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def report(rows: list[Row], setting: Row) -> dict[str, Any]:
    """Print a table and the same as JSON; returns what the JSON holds."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "raw"))
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(text) for text in column) for column in zip(columns, *cells, strict=True)]
    out = sys.stdout
    for line in [columns, *cells]:
        out.write("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + "\n")
    result = {"environment": setting, "rows": rows}
    out.write(json.dumps(result) + "\n")
    return result


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
