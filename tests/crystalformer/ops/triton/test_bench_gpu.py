"""tests/benchmarks/gpu.py runs from end to end, here in the interpreter with two crystals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


def test_every_section_of_the_gpu_benchmark(tmp_path: Path) -> None:
    report = tmp_path / "gpu.json"
    small = ["--device", "cpu", "--batch", "2", "--atoms", "1", "--repeats", "1", "--cases", "one-atom"]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *small, "--json", str(report)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[4]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    rows = json.loads(report.read_text())
    assert {row.get("section") for row in rows[1:]} == {"correctness", "G1", "G3", "tiles"}
    assert [row["passed"] for row in rows if "passed" in row] == [True]
    assert all(row["ms"] > 0 for row in rows if "ms" in row)
