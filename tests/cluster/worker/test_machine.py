"""What a worker says of itself."""

import platform

import torch

from cluster.worker.machine import device_name, peak_memory_mb

CPU = torch.device("cpu")


def test_a_cpu_is_named_by_its_kind():
    assert device_name(CPU) == f"cpu: {platform.machine()}"


def test_peak_memory_counts_what_was_let_go():
    before = peak_memory_mb(CPU)
    held = torch.ones(int(before * 1e6) // 4 + 25_000_000)  # as much as there ever was, and 100 MB more
    peak = peak_memory_mb(CPU)
    assert before + 100 < peak < 3 * before + 1000
    assert len(held) > 0
    del held
    assert peak_memory_mb(CPU) >= peak
