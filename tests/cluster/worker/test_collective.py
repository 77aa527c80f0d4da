"""Sums over workers that talk by a backend for GPUs alone."""

import multiprocessing
import re

import pytest
import torch

from cluster.worker.collective import all_reduce


def sum_of_numbers(rank: int, folder: str, replies) -> None:
    """All-reduce a CPU tensor in a group that, like NCCL's, serves CUDA tensors only."""
    torch.distributed.init_process_group("cuda:gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    value = torch.tensor([1.0, 10.0]) * (rank + 1)
    try:
        replies.put([all_reduce(value).tolist(), value.tolist()])
    except (AssertionError, RuntimeError) as error:
        replies.put(str(error))


def test_what_lies_on_the_cpu_goes_by_way_of_the_gpu(tmp_path):
    context = multiprocessing.get_context("spawn")
    replies = context.Queue()
    processes = [context.Process(target=sum_of_numbers, args=(rank, str(tmp_path), replies)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [replies.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    if torch.cuda.is_available():
        assert found == [[[3.0, 30.0], [3.0, 30.0]]] * 2
    else:  # sent to a GPU, which a build of PyTorch without CUDA misses in other words than one with it
        missing = "Torch not compiled with CUDA|Found no NVIDIA driver|No CUDA GPUs are available"
        assert all(isinstance(text, str) and re.search(missing, text) for text in found), found


@pytest.mark.parametrize(("maximum", "expected"), [(False, 3.0), (True, 2.0)])
def test_sums_and_maxima_are_in_place(workers, maximum, expected):
    assert workers(2).run(reduced, maximum) == [(expected, expected)] * 2


def reduced(place, maximum):
    value = torch.tensor(float(place.rank + 1))
    return float(all_reduce(value, maximum=maximum)), float(value)
