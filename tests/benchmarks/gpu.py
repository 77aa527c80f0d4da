"""The whole measurement of the Triton backend on one GPU, in under 8 minutes: python -m tests.benchmarks.gpu

Needs torch, triton, numpy, pytest and this checkout, nothing else. Prints rows as they are found and a table in
Markdown at the end; with --json FILE, the file holds all rows at any time.

correctness  every test case on the GPU against the float64 oracle (relative_error beside its limit and beside
             torch_error, our torch backend's on the same GPU), and two runs bit for bit
tests        pytest -m gpu
G1           training step (forward, backward, clipping, AdamW) of the default model, batch 256 of about 10 atoms:
             triton against our torch backend, launched one by one, as one CUDA graph and under autocast; peak memory.
             All of it deterministic, as training runs, and by torch's defaults
G3           the attention kernels against the floor that this GPU's measured bandwidth, rate of products and
             exponentials a second set for their bytes and operations
tiles        the same kernels with other tile heights and warps (crystalformer.ops.triton.tiles.choose)
compile      the step under torch.compile

Every section has processes of its own (gpu_process.py), so that one which crashes, hangs or spoils the GPU's state
ends alone, and --limit seconds; all have --total seconds. Ctrl-C and SIGTERM end the measurement with its table.

The crystals are made up. An atom has 73 shell rows within its reach; with --sites random 173, since no two images
share a distance; in the real crystals of tests/golden 43.
On a machine without a GPU: TRITON_INTERPRET=1 python -m tests.benchmarks.gpu --device cpu --batch 2 --repeats 1
"""

from __future__ import annotations

import argparse
import contextlib
import io
import signal
import sys
import time
from functools import partial
from pathlib import Path

from tests.benchmarks.gpu_process import own_output, run_tasks, serve
from tests.benchmarks.gpu_report import Report, show

SECTIONS = ("correctness", "tests", "G1", "G3", "tiles", "compile")
"""What is worth most comes first."""

PARTS = {
    "machine": ["machine"],
    "correctness": ["correctness"],
    "tests": ["tests"],
    "G1": ["G1-deterministic", "G1-defaults"],
    "G3": ["G3"],
    "tiles": ["tiles"],
    "compile": ["compile"],
}
"""The processes of each section; two where torch is set up in two ways, since cuBLAS reads its setting once."""


def main(arguments: list[str]) -> bool:
    """Run the chosen sections; whether there were verdicts and all of them good."""
    options = _options(arguments)
    report, end = Report(options.json), time.monotonic() + options.total
    try:
        measure(report, "machine", arguments, min(options.limit, options.total))
        # Without a GPU, torch or triton every section would say what the first row says.
        for section in options.sections if all(row.get("passed", True) for row in report.rows) else []:
            start = time.monotonic()
            measure(report, section, arguments, min(options.limit, end - start))
            show({"section": section, "seconds": time.monotonic() - start})
    except KeyboardInterrupt:
        report.add({"section": "", "what": "the rest", "passed": False, "error": "interrupted"})
    finally:
        sys.stdout.write("\n" + report.table())
        sys.stdout.flush()
    return report.passed


def measure(report: Report, section: str, arguments: list[str], limit: float) -> None:
    """Take the rows that the section's processes find within ``limit`` seconds."""
    end = time.monotonic() + limit
    for part in PARTS[section]:
        left = end - time.monotonic()
        if left <= 0:
            report.add({"section": section, "what": part, "passed": False, "error": "not begun: no time was left"})
            continue
        with contextlib.closing(run_tasks(partial(_command, arguments, part), left)) as rows:
            for row in rows:
                report.add({"section": section, **row})


def _command(arguments: list[str], part: str, first: int, seconds: float) -> list[str]:
    own = ["--part", part, "--first", str(first), "--limit", str(seconds)]
    return [sys.executable, "-X", "faulthandler", "-m", "tests.benchmarks.gpu", *arguments, *own]


def serve_part(options: argparse.Namespace) -> int:
    """A section's process: its tasks from --first on. Only here is anything imported that may touch a GPU."""
    out, options.end = own_output(), time.monotonic() + options.limit
    import torch

    from tests.benchmarks.gpu_sections import tasks_of
    from tests.benchmarks.gpu_timing import sound

    return serve(tasks_of(options.part, options), options.first, out, lambda: sound(torch.device(options.device)))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--batch", type=int, default=256, help="crystals")
    parser.add_argument("--atoms", type=int, default=10, help="atoms a crystal on average")
    parser.add_argument("--sites", default="grid", choices=("grid", "random"), help="where the atoms are")
    parser.add_argument("--repeats", type=int, default=30, help="timed calls; medians are printed")
    parser.add_argument("--cases", nargs="*", help="names of the cases to check (all)")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds a section")
    parser.add_argument("--total", type=float, default=460.0, help="seconds for all sections")
    parser.add_argument("--json", type=Path, help="file for the rows as JSON")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.json and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    return options


if __name__ == "__main__":
    chosen = _options(sys.argv[1:])
    if chosen.part:
        sys.exit(serve_part(chosen))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without µ is no reason to end
    for number in (signal.SIGINT, signal.SIGTERM):  # the first may be ignored, in a shell's background
        signal.signal(number, signal.default_int_handler)
    sys.exit(0 if main(sys.argv[1:]) else 1)
