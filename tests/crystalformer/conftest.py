"""Every test of the library starts from the same random numbers, whatever ran before it, and in one thread."""

import os

import pytest
import torch

# Some versions of PyTorch read it once, at the first matrix product on a GPU: too late for the tests that need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(20240501)


@pytest.fixture(autouse=True, scope="package")
def _one_thread():
    """Crystals here are small, and threads that wait for each other make tests slow beside other work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
