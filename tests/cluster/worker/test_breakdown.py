import time

import pytest
import torch

from cluster.worker.breakdown import Breakdown

CPU = torch.device("cpu")


def test_seconds_add_up_by_part_and_start_again():
    breakdown = Breakdown(CPU, enabled=True)
    start = time.perf_counter()
    for _ in range(2):
        with breakdown.part("forward"):
            time.sleep(0.02)
    with breakdown.part("backward"):
        pass
    whole = time.perf_counter() - start
    taken = breakdown.take()
    assert list(taken) == ["forward", "backward"]
    assert 0.04 <= taken["forward"] <= whole
    assert breakdown.take() == {}


def test_an_error_passes_and_its_time_counts():
    breakdown = Breakdown(CPU, enabled=True)
    with pytest.raises(ValueError), breakdown.part("data"):
        raise ValueError
    assert "data" in breakdown.take()


def test_it_is_silent_unless_asked_for():
    breakdown = Breakdown(CPU, enabled=False)
    with breakdown.part("forward"):
        pass
    assert breakdown.take() == {}
