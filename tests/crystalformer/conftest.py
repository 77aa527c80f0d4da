"""Every test of the library starts from the same random numbers, whatever ran before it, and in one thread."""

import pytest
import torch


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
