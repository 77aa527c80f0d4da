"""Runs interpreted.py, and what of test_gpu*.py needs no GPU, with Triton's interpreter switched on, in processes
that disturb no other test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

PARTS = (("interpreted.py", "test_gpu.py"), ("test_gpu_models.py", "test_gpu_graphs.py"))
"""Two runs beside each other, about as long."""


def test_kernels_through_tritons_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", *map(str, files), "-p", "no:cacheprovider", "--durations=2"],
            env=environment,
            cwd=folder.parents[3],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for files in ([folder / name for name in part] for part in PARTS)
    ]
    reports = [run.communicate(timeout=1000)[0] for run in runs]
    with capsys.disabled():
        for report in reports:
            sys.stdout.write("\n" + "\n".join(report.splitlines()[-4:]))
    for run, report in zip(runs, reports, strict=True):
        assert run.returncode == 0, report[-8000:]
        assert "skipped" not in report.splitlines()[-1], report[-8000:]


def test_every_file_for_a_gpu_has_a_part() -> None:
    files = {path.name for path in Path(__file__).parent.glob("test_gpu*.py")}
    assert files <= {name for part in PARTS for name in part}
