"""Runs interpreted.py with Triton's interpreter switched on, in processes that disturb no other test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

PARTS = ("golden or torch", "not (golden or torch)")
"""Two runs beside each other, about as long."""


def test_kernels_through_tritons_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", str(file), "-k", part, "-p", "no:cacheprovider", "--durations=2"],
            env=environment,
            cwd=Path(__file__).parents[4],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in PARTS
    ]
    reports = [run.communicate(timeout=500)[0] for run in runs]
    with capsys.disabled():
        for report in reports:
            sys.stdout.write("\n" + "\n".join(report.splitlines()[-4:]))
    for run, report in zip(runs, reports, strict=True):
        assert run.returncode == 0, report[-8000:]
