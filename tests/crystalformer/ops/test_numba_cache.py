"""Kernels kept on disk are compiled again when any file of theirs has changed, not only their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import crystalformer

TRANSPOSED = """
import numpy as np
from crystalformer.ops.numba.lanes import to_lanes
values, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
to_lanes(values, np.zeros(1, np.int64), 8, 8, 0, 1, out)
print(sum(to_lanes.stats.cache_hits.values()), bool((out.reshape(8, 8) == values.reshape(8, 8).T).all()))
"""


@pytest.fixture
def copy(tmp_path):
    """The package where its files can be changed."""
    shutil.copytree(
        Path(crystalformer.__file__).parent, tmp_path / "crystalformer", ignore=shutil.ignore_patterns("__pycache__")
    )
    return tmp_path


def run(folder, **more):
    """How often what was kept was used, and whether lanes.to_lanes transposes."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(folder / "kept"), **more}
    done = subprocess.run(
        [sys.executable, "-c", TRANSPOSED], env=environment, cwd=folder, capture_output=True, text=True, check=True
    )
    hits, right = done.stdout.split()
    return int(hits), right == "True"


def test_a_change_in_a_file_that_a_kernel_uses_compiles_it_again(copy):
    assert run(copy) == (0, True)
    assert run(copy) == (1, True)
    simd = copy / "crystalformer" / "ops" / "numba" / "simd.py"
    text = simd.read_text()
    assert "for apart in (1, 2, 4)" in text
    simd.write_text(text.replace("for apart in (1, 2, 4)", "for apart in (1, 2)"))
    old = {path: path.read_bytes() for path in (copy / "kept").rglob("*.nbc")}
    assert run(copy) == (0, False)
    for path, code in old.items():  # as where a process was killed between the new index and the new code
        path.write_bytes(code)
    assert run(copy) == (1, False)


def test_processors_that_share_a_home_do_not_share_code(copy):
    assert run(copy) == (0, True)
    assert run(copy, NUMBA_CPU_NAME="nehalem") == (0, True)
    assert run(copy) == run(copy, NUMBA_CPU_NAME="nehalem") == (1, True)
    names = [path.name for path in (copy / "kept").rglob("*.nbc")]
    assert len(set(names)) == len(names) > 1
