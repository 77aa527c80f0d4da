"""Which crystals make a step, and who works on which: functions of seed, epoch and costs alone.

The batches do not depend on the number of workers; a worker count is not a hyperparameter.
"""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def permutation(rows: int, seed: int, epoch: int) -> IntArray:
    """The order of an epoch (counted from 1) over ``rows`` crystals."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def global_batches(rows: int, batch_size: int, seed: int, epoch: int) -> list[IntArray]:
    """The epoch's training batches, each of ``batch_size`` rows; the last partial one is dropped."""
    order = permutation(rows, seed, epoch)
    return [order[start : start + batch_size] for start in range(0, rows - batch_size + 1, batch_size)]


def deal(rows: IntArray, costs: IntArray, parts: int, *, at_least: int = 1) -> list[IntArray]:
    """Split ``rows`` into ``parts`` of about even cost, each of ``at_least`` rows where there are rows enough.

    Largest first, each to the part with the least cost so far (ties: fewest rows, then the lower number). Within a
    part the rows are in ascending order of cost, so that crystals of like size are neighbours in the batch.
    """
    heap = [(0, 0, part) for part in range(parts)]
    dealt: list[list[int]] = [[] for _ in range(parts)]
    left, owed = len(rows), parts * at_least
    for position in np.argsort(-costs, kind="stable").tolist():
        if left <= owed:  # the smallest rows go to the parts that are short of rows, whatever these cost
            heap = [entry for entry in heap if entry[1] < at_least] or heap
            heapq.heapify(heap)
        cost, count, part = heapq.heappop(heap)
        dealt[part].append(position)
        heapq.heappush(heap, (cost + max(int(costs[position]), 1), count + 1, part))
        left, owed = left - 1, owed - (count < at_least)
    return [rows[np.array(positions[::-1], dtype=np.int64)] for positions in dealt]


def micro_batches(batch: IntArray, costs: IntArray, workers: int, accumulation: int) -> list[list[IntArray]]:
    """A global batch as [part that gradients accumulate over][worker], no worker without a row in any part.

    ``costs`` are those of all rows, ``batch`` indexes them. The parts are equally many rows and do not depend on the
    number of workers, so neither does batch normalization, whose statistics are those of a part.
    """
    parts = deal(batch, costs[batch], accumulation, at_least=len(batch) // accumulation)
    return [deal(part, costs[part], workers) for part in parts]
