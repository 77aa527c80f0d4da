"""Compiled code that is kept: damage costs the time to compile again, and no room nothing else."""

import os
import resource
import subprocess
import sys

import pytest

pytest.importorskip("numba")

ADD = """
from crystalformer.ops.numba.simd import compiled


@compiled
def added(a, b):
    return a + b


print(added(1, 2))
"""


def added(folder, **more):
    """What a process says that keeps its code in a folder."""
    file = folder / "adding.py"
    file.write_text(ADD)
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kept"), "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, **more)
    assert done.stdout == "3\n", done.stderr
    return sorted(path for path in (folder / "kept").rglob("adding*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_damaged_files_are_made_anew(tmp_path, suffix):
    whole = added(tmp_path)
    assert {path.suffix for path in whole} == {".nbi", ".nbc"}
    for path in whole:
        if path.suffix == suffix:
            path.write_bytes(b"")
    assert added(tmp_path) == whole


def test_where_there_is_no_room_nothing_is_kept(tmp_path):
    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    assert added(tmp_path, preexec_fn=no_room) == []
    assert added(tmp_path) != []
