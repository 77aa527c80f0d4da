"""A lock is held by one process at a time and goes with it."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from data_pipeline.errors import DataError
from data_pipeline.lock import locked
from tests.users import as_nobody, needs_root

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


def test_where_there_are_no_locks_the_user_is_told(tmp_path, monkeypatch, caplog):
    def no_locks(handle, how):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path / "lock"):
        pass
    assert f"{tmp_path} has no file locks: see that no other process prepares data there" in caplog.text


@needs_root
def test_the_lock_of_another_user_may_be_held(tmp_path):
    """One who may write into the folder, too, and made the file with the usual umask."""
    (tmp_path / "lock").touch()
    (tmp_path / "lock").chmod(0o644)

    def hold():
        with locked(tmp_path / "lock"):
            pass

    assert as_nobody(tmp_path, hold) == 0
