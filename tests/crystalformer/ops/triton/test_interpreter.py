"""Runs interpreted.py with Triton's interpreter switched on, in a process that disturbs no other test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


def test_kernels_through_tritons_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider", "--durations=3", "--no-header"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[4]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=500, check=False)
    with capsys.disabled():
        sys.stdout.write("\n" + "\n".join(run.stdout.splitlines()[-6:]) + "\n")
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
