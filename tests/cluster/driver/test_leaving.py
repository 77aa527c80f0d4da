"""A checkpoint where a node is about to go, agreed on by all workers."""

import os
from pathlib import Path

import pytest
import torch

from cluster.worker.coordination import LEAVING_VARIABLE, Coordinator, Order
from cluster.worker.machine import Place


class Quiet:
    """A host that never wants a stop."""

    def stopping(self) -> bool:
        return False

    def saving(self) -> bool:
        return False


def orders(place, folder: str, steps: int, leaves_at: dict[int, int]) -> list[tuple[str, bool]]:
    """What a worker is told, step by step, and whether its file is there; a checkpoint is written two steps later."""
    file = Path(folder) / f"leaving-{place.rank}"
    os.environ[LEAVING_VARIABLE] = str(file)
    state = {"due": None, "step": 0}
    now = iter(range(10_000))
    coordinator = Coordinator(
        Quiet(), place, lambda: state["due"] is not None and state["step"] >= state["due"], 1e9, lambda: next(now)
    )
    told = []
    for step in range(1, steps + 1):
        state["step"] = step
        if leaves_at.get(place.rank) == step:
            file.touch()
        order = coordinator.order(step)
        if order is Order.CHECKPOINT:
            state["due"] = step + 2
        elif order is Order.REGISTER:
            state["due"] = None
        told.append((order.name, file.exists()))
    return told


def test_one_leaves(two_workers, tmp_path):
    first, second = two_workers.run(orders, str(tmp_path), 8, {1: 3})
    names = ["GO_ON", "GO_ON", "CHECKPOINT", "GO_ON", "REGISTER", "GO_ON", "GO_ON", "GO_ON"]
    assert [name for name, _ in first] == [name for name, _ in second] == names
    assert [there for _, there in second] == [False, False, True, True, True, False, False, False]


def test_two_leave_one_after_the_other(two_workers, tmp_path):
    first, second = two_workers.run(orders, str(tmp_path), 12, {0: 2, 1: 7})
    assert first == [(name, there) for (name, _), (_, there) in zip(second, first, strict=True)]
    assert [step for step, (name, _) in enumerate(first, 1) if name == "CHECKPOINT"] == [2, 7]
    assert not first[-1][1]
    assert not second[-1][1]


def test_a_second_leaves_while_the_first_checkpoint_is_written(two_workers, tmp_path):
    first, _ = two_workers.run(orders, str(tmp_path), 10, {0: 2, 1: 3})
    assert [step for step, (name, _) in enumerate(first, 1) if name == "CHECKPOINT"] == [2, 3]


def test_none_leaves(two_workers, tmp_path):
    for told in two_workers.run(orders, str(tmp_path), 5, {}):
        assert told == [("GO_ON", False)] * 5


class Wishing:
    """A host that wants a stop from its second question on."""

    def __init__(self) -> None:
        self._asked = 0

    def stopping(self) -> bool:
        self._asked += 1
        return self._asked > 1

    def saving(self) -> bool:
        return False


@pytest.mark.parametrize("first", [1, 50_001])
def test_a_run_that_goes_on_hears_a_wish_as_soon_as_one_that_begins(first):
    now = iter(range(10_000))  # a second a step
    place = Place(rank=0, world_size=1, device=torch.device("cpu"))
    coordinator = Coordinator(Wishing(), place, lambda: False, 1e9, lambda: next(now))
    assert [coordinator.order(step) for step in (first, first + 1)] == [Order.GO_ON, Order.STOP]
