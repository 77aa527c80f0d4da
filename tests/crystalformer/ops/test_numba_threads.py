"""How compiled code is shared among PyTorch's threads: failures, callers beside one another, a forked process."""

import ctypes
import math
import multiprocessing
import sys
import threading
import time

import numpy as np
import pytest
import torch

from crystalformer.ops.numba import threads
from crystalformer.ops.numba.fork import claim, fork
from crystalformer.ops.numba.simd import compiled
from tests.crystalformer.crystals import batch_of, random_crystal
from tests.crystalformer.ops.operands import attend, operands


@compiled
def count(entered, pieces, done, failing):
    claim(entered)
    piece = claim(pieces)
    while piece < len(done):
        if piece == failing:
            raise ValueError
        done[piece] += 1
        piece = claim(pieces)


@compiled
def shared(parallel, number, done, failing):
    entered, pieces = np.zeros(1, np.int64), np.zeros(1, np.int64)
    fork(count, parallel, number, (entered, pieces, done, failing))
    return entered[0]


@compiled
def dawdle(entered, steps, out):
    x = float(claim(entered))
    for _ in range(steps):
        x = math.cos(x)
    out[0] += x


@compiled
def slow(parallel, number, entered, steps, out):
    fork(dawdle, parallel, number, (entered, steps, out))


@pytest.fixture
def parallel() -> int:
    """Address of PyTorch's OpenMP."""
    address = threads.parallel()
    if address == 0:
        assert sys.platform != "linux" or "OpenMP" not in torch.__config__.parallel_info()
        pytest.skip("PyTorch's OpenMP is not GNU's here")
    return address


@pytest.mark.parametrize("number", [1, 2, 3, 7])
def test_every_piece_is_done_once_and_all_threads_come(parallel, number):
    done = np.zeros(1000, np.int64)
    for _ in range(20):
        assert shared(parallel, number, done, -1) == number
    assert (done == 20).all()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("failing", [0, 500])
def test_a_failure_in_any_thread_is_raised_and_the_next_work_is_done(parallel, number, failing):
    done = np.zeros(1000, np.int64)
    with pytest.raises(RuntimeError, match="a thread of the attention kernels failed"):
        shared(parallel, number, done, failing)
    done[:] = 0
    shared(parallel, number, done, -1)
    assert (done == 1).all()


def test_callers_beside_one_another(parallel):
    """Each has threads of its own."""
    entered, out = np.zeros(1, np.int64), np.zeros(1)
    slow(parallel, 1, entered, 1, out)
    first = threading.Thread(target=slow, args=(parallel, 2, entered, 100_000_000, out))
    first.start()
    while entered[0] < 3:
        time.sleep(0.001)
    done = np.zeros(1000, np.int64)
    number = shared(parallel, 2, done, -1)
    assert first.is_alive()
    first.join()
    assert (done == 1).all()
    assert number == 2


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """The numbers of threads that are asked for; all the work is done by the one that asks."""
    numbers: list[int] = []

    def alone(entry, data, number, _):
        numbers.append(number)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry)(data)

    unsigned = ctypes.c_uint
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, unsigned, unsigned)(alone)
    address = ctypes.cast(call, ctypes.c_void_p).value
    monkeypatch.setattr(threads, "parallel", lambda: address)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield numbers
    torch.set_num_threads(before)
    assert call  # kept until here


@pytest.mark.parametrize(("share", "number"), [(1.01, None), (0.5, 2), (0.34, 2), (0.2, 4)])
def test_threads_are_asked_for_where_there_is_work_for_them(asked, monkeypatch, share, number):
    """For so many of the shells in reach, in the forward, the backward by query and that by key."""
    batch = batch_of(random_crystal(40, seed=0))
    given = operands(batch, scale=0.6).to(torch.float32)
    given.rho[:] = 0.6
    inside = batch.shells(6.0 * 0.6 / math.sqrt(0.5)).distance <= 6.0 * 0.6 / math.sqrt(0.6)
    monkeypatch.setattr(threads, "SHELLS_A_THREAD", int(share * int(inside.sum())))
    attend(batch, given, "numba", 6.0)
    assert asked == ([] if number is None else [number] * 3)


def _in_child(queue, batch, given):
    torch.set_num_threads(4)
    number = threads.team().threads
    torch.set_num_threads(1)  # PyTorch's own operations would wait for its OpenMP's threads
    queue.put((number, attend(batch, given, "numba")["dv"].numpy().tobytes()))


def test_a_forked_process_does_its_work_itself():
    batch = batch_of(random_crystal(60, seed=0))
    given = operands(batch, scale=0.6).to(torch.float32)
    expected = attend(batch, given, "numba")["dv"].numpy().tobytes()
    forking = multiprocessing.get_context("fork")
    queue = forking.SimpleQueue()
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as above
    child = forking.Process(target=_in_child, args=(queue, batch, given))
    child.start()
    torch.set_num_threads(before)
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == (1, expected)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_where_openmp_is_not_gnus_there_is_one_thread(parallel, three_threads, monkeypatch):
    """And the numbers are the same."""
    batch = batch_of(random_crystal(60, seed=0))
    given = operands(batch, scale=0.6).to(torch.float32)
    monkeypatch.setattr(threads, "SHELLS_A_THREAD", 100)
    assert threads.team().threads == 3
    several = attend(batch, given, "numba")
    monkeypatch.setattr(threads, "parallel", lambda: 0)
    assert threads.team().threads == 1
    for name, value in attend(batch, given, "numba").items():
        assert torch.equal(value, several[name]), name
