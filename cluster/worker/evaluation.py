"""Predicting a split over all workers: every crystal once, the same numbers on every worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cluster.data.dealing import deal
from cluster.data.feed import Feed, TargetScaling
from cluster.worker.collective import all_reduce
from cluster.worker.engine import Engine
from cluster.worker.machine import Place

Floats = npt.NDArray[np.float64]

EVAL_BATCH = 128
"""Crystals a worker evaluates at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A split's normalized predictions and targets, (n, T) each, in the split's order."""

    prediction: Floats
    truth: Floats

    @property
    def score(self) -> float:
        """Mean normalized absolute error over crystals and targets: what the best epoch is chosen by."""
        return float(np.abs(self.prediction - self.truth).mean())

    def mae(self, scaling: TargetScaling, targets: tuple[str, ...]) -> dict[str, float]:
        """Mean absolute error of each target, in its unit."""
        normalized = np.abs(self.prediction - self.truth).mean(0)
        return dict(zip(targets, (normalized * np.array(scaling.scale)).tolist(), strict=True))


def evaluate(engine: Engine, feed: Feed, place: Place) -> Evaluation:
    """Predict every crystal of ``feed``, each on one worker."""
    rows = np.arange(feed.num_rows)
    mine = deal(rows, feed.costs, place.world_size)[place.rank]
    results = torch.zeros(2, feed.num_rows, feed.num_targets, dtype=torch.float64)
    batches = [mine[start : start + EVAL_BATCH] for start in range(0, len(mine), EVAL_BATCH)]
    forwards = _forwards_to_share(engine, len(batches))  # before the first, as workers meet in the same order only
    for part in batches:
        batch, target = feed.batch(part, place.device)
        results[0, torch.from_numpy(part)] = engine.predict(batch).double().cpu()
        results[1, torch.from_numpy(part)] = target.double().cpu()
    for _ in range(forwards - len(batches)):
        engine.predict(feed.batch(rows[:1], place.device)[0])
    whole = all_reduce(results.to(place.device)).cpu().numpy()
    return Evaluation(prediction=whole[0], truth=whole[1])


def _forwards_to_share(engine: Engine, own: int) -> int:
    """How many forwards this worker must make: at stage 3 each is collective, so as many as the busiest worker."""
    if engine.stage < 3:
        return own
    return int(all_reduce(torch.tensor([float(own)]), maximum=True))
