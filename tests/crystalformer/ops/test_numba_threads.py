"""How atoms are shared among threads: where they are cut, what runs, errors, a second caller, a forked process."""

import multiprocessing
import sys
import threading

import numpy as np
import pytest
import torch

from crystalformer.ops.numba import threads as threads_module
from crystalformer.ops.numba.threads import SHELLS_A_THREAD, bounds, share


@pytest.fixture(params=["PyTorch's", "our own"])
def team(request, monkeypatch):
    """Whose threads they are: PyTorch's OpenMP, or ours as where that is not GNU's."""
    if request.param == "our own":
        monkeypatch.setattr(threads_module, "_open_mp", lambda: None)
    elif threads_module._open_mp() is None:
        assert sys.platform != "linux" or "GNU" not in torch.__config__.show()
        pytest.skip("PyTorch's OpenMP is not GNU's here")


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("step", [1, 32])
def test_threads_get_as_many_shells_each(four_threads, step):
    used = np.arange(1, 1001) % 300 + 1
    used *= -(-4 * SHELLS_A_THREAD // int(used.sum()))
    cuts = bounds(used, step)
    assert (cuts[0], cuts[-1], len(cuts)) == (0, 1000, 5)
    assert all(cut % step == 0 for cut in cuts[:-1])
    shells = [int(used[first:last].sum()) for first, last in zip(cuts, cuts[1:], strict=False)]
    assert max(shells) <= 1.2 * sum(shells) / 4


def test_little_work_is_not_shared(four_threads):
    assert bounds(np.full(10, SHELLS_A_THREAD // 10)) == [0, 10]
    assert bounds(np.array([10 * SHELLS_A_THREAD])) == [0, 1]


def test_all_of_it_is_done_once_in_as_many_threads_as_pieces(team):
    done, together = np.zeros(100, int), threading.Barrier(3)

    def work(first, last):
        together.wait(30)  # none gets past it before there are three
        done[first:last] += 1

    for _ in range(50):
        share(work, [0, 20, 60, 100])
    assert (done == 50).all()


@pytest.mark.parametrize("failing", [0, 50])
def test_errors_of_any_thread_are_raised_and_the_next_work_is_done(team, failing):
    done = []

    def work(first, last):
        if first == failing:
            raise ZeroDivisionError(str(first))
        done.append((first, last))

    with pytest.raises(ZeroDivisionError, match=str(failing)):
        share(work, [0, 50, 100])
    share(lambda first, last: done.append((first, last)), [0, 30, 100])
    assert sorted(done[-2:]) == [(0, 30), (30, 100)]


def test_a_caller_beside_another_does_its_work_itself(team):
    inside, go_on, done = threading.Event(), threading.Event(), []

    def slow(first, last):
        inside.set()
        assert go_on.wait(30)

    first = threading.Thread(target=share, args=(slow, [0, 1, 2]))
    first.start()
    assert inside.wait(30)
    share(lambda first, last: done.append((first, last)), [0, 5, 10])
    go_on.set()
    first.join(30)
    assert done == [(0, 10)]


def _share_in_child(queue):
    done = []
    share(lambda first, last: done.append((first, last)), [0, 20, 60, 100])
    queue.put(done)


def test_a_forked_process_does_its_work_itself(team):
    share(lambda *_: None, [0, 20, 60, 100])
    forking = multiprocessing.get_context("fork")
    queue = forking.SimpleQueue()
    child = forking.Process(target=_share_in_child, args=(queue,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get() == [(0, 100)]
