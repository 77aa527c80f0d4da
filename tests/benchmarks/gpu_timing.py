"""Timing calls on a GPU: medians, CUDA graphs, and a GPU that is still sound."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

GRAPH_WARM_UP = 3
"""Calls that ``graphed`` makes before it captures one."""


def median_ms(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Median milliseconds of a call, from its launch to the end of its work."""
    times = []
    warm_up = max(1, repeats // 5)
    for attempt in range(repeats + warm_up):
        wait(device)
        start = time.perf_counter()
        function()
        wait(device)
        if attempt >= warm_up:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def kernel_us(function: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Microseconds of one call; on a GPU of 20 calls in a graph, so that launching them does not count."""
    if device.type != "cuda":
        return 1e3 * median_ms(function, repeats, device)
    return 1e3 * median_ms(graphed(function, 20), repeats, device) / 20


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def graphed(function: Callable[[], Result], calls: int = 1) -> Callable[[], Result]:
    """``calls`` calls of a function without host work, as one CUDA graph: what the GPU alone needs.

    What it gives is the last call's result, whose tensors every replay fills anew.
    """
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_WARM_UP):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = function()

    def replay() -> Result:
        graph.replay()
        return result

    return replay


def sound(device: torch.device) -> bool:
    """After an error: whether the device can still be used. Gives memory back, which may have been what lacked."""
    try:
        wait(device)
    except Exception as error:  # noqa: BLE001 - whatever it raises, it is not sound
        sys.stderr.write(f"{device} can no longer be used: {error}\n")
        return False
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return True
