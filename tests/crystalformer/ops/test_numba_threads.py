"""How atoms are shared among threads: where they are cut, what runs, errors, a second caller."""

import threading

import numpy as np
import pytest
import torch

from crystalformer.ops.numba.threads import SHELLS_A_THREAD, bounds, share


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


def test_all_of_it_is_done_once_and_by_several_threads():
    done, names = np.zeros(100, int), set()

    def work(first, last):
        done[first:last] += 1
        names.add(threading.current_thread().name)

    for _ in range(50):
        share(work, [0, 20, 60, 100])
    assert (done == 50).all()
    assert len(names) >= 2


@pytest.mark.parametrize("failing", [0, 50])
def test_errors_of_any_thread_are_raised_and_the_next_work_is_done(failing):
    done = []

    def work(first, last):
        if first == failing:
            raise ZeroDivisionError(str(first))
        done.append((first, last))

    with pytest.raises(ZeroDivisionError, match=str(failing)):
        share(work, [0, 50, 100])
    share(lambda first, last: done.append((first, last)), [0, 30, 100])
    assert sorted(done[-2:]) == [(0, 30), (30, 100)]


def test_a_caller_beside_another_does_its_work_itself():
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
