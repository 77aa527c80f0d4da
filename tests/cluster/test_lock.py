"""A run's lock: one holder at a time, also where the file is deleted while others wait for it."""

import threading

import pytest

from cluster import lock
from cluster.lock import InUseError, locked


def test_a_lock_that_its_holder_deletes_is_held_by_one_of_those_that_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    file, taken, over = tmp_path / "lock", threading.Event(), threading.Event()

    def wait():
        with locked(file, patience=60):
            taken.set()
            over.wait(60)

    with locked(file):
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert not taken.wait(0.3)
        file.unlink()
    assert taken.wait(60)
    with pytest.raises(InUseError), locked(file):
        pass
    over.set()
    waiting.join()
    with locked(file):
        pass
