"""A lock is held by one process at a time and goes with it."""

import subprocess
import sys

import pytest

from data_pipeline.errors import DataError
from data_pipeline.lock import locked

HOLD = """
import sys, time
from pathlib import Path
from data_pipeline.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1]).with_name("done").touch()
"""


def hold(path, seconds):
    words = [sys.executable, "-c", HOLD, str(path), str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_others_wait_for_the_end(tmp_path):
    with hold(tmp_path / "lock", 0.5) as other, locked(tmp_path / "lock"):
        assert (tmp_path / "done").exists()
    assert other.returncode == 0


def test_a_killed_process_holds_nothing(tmp_path):
    with hold(tmp_path / "lock", 600) as other:
        other.kill()
        with locked(tmp_path / "lock"):
            assert not (tmp_path / "done").exists()


def test_no_place_for_the_file(tmp_path):
    with (
        pytest.raises(DataError, match="nowhere: cannot be written to: lock: No such file"),
        locked(tmp_path / "nowhere" / "lock"),
    ):
        pass
