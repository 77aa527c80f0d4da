"""Evaluating over workers: every crystal once, the same numbers on each and on one worker alone."""

import math

import numpy as np
import pytest
import torch

from cluster.data.dealing import deal
from cluster.data.feed import TargetScaling
from cluster.worker import evaluation as module
from cluster.worker.evaluation import Evaluation, evaluate
from tests.cluster.small import TARGETS, small_config, small_crystals
from tests.cluster.worker.test_engine import feed_of, new_engine


@pytest.fixture(scope="module")
def crystals(small_tables):
    return small_crystals(small_tables["train"], 24)


def evaluate_here(place, tables, flat, at_once) -> tuple[Evaluation, int]:
    """And how many batches the worker's own crystals make: of 24 two workers get 13 and 11, three 9, 8 and 7."""
    engine, feed = new_engine(place, tables, flat)
    shares = []

    def uneven(rows, costs, parts):
        shares[:] = deal(rows, costs, parts)
        if parts > 1:
            shares[0], shares[-1] = np.append(shares[0], shares[-1][:1]), shares[-1][1:]
        return shares

    with pytest.MonkeyPatch.context() as patch:  # the worker serves other tests after this one
        patch.setattr(module, "EVAL_BATCH", at_once)
        patch.setattr(module, "deal", uneven)
        evaluation = evaluate(engine, feed, place)
    return evaluation, math.ceil(len(shares[place.rank]) / at_once)


@pytest.mark.timeout(120)  # workers that do not meet wait for one another
@pytest.mark.parametrize(
    ("size", "stage", "at_once", "batches"),
    [(1, 0, 5, [5]), (2, 0, 24, [1, 1]), (2, 2, 12, [2, 1]), (2, 3, 3, [5, 4]), (3, 3, 8, [2, 1, 1])],
)
def test_every_crystal_is_predicted_once(workers, crystals, size, stage, at_once, batches):
    """Workers' shares differ in length, and at stage 3 each forward is collective all the same."""
    flat = small_config(zero_stage=stage).to_flat()
    alone = workers(1).run(evaluate_here, crystals, small_config().to_flat(), 24)[0][0]
    found = workers(size).run(evaluate_here, crystals, flat, at_once)
    assert [number for _, number in found] == batches
    _, target = feed_of(crystals).batch(np.arange(24), torch.device("cpu"))
    for one, _ in found:
        assert np.array_equal(one.truth, target.double().numpy())
        assert np.array_equal(one.prediction, found[0][0].prediction)
        assert one.prediction == pytest.approx(alone.prediction, rel=1e-4, abs=1e-6)
    assert len(np.unique(alone.prediction[:, 0])) == 24


def test_errors_are_means_in_units():
    evaluation = Evaluation(prediction=np.array([[1.0, 0.0], [0.0, 2.0]]), truth=np.zeros((2, 2)))
    assert evaluation.score == 0.75
    scaling = TargetScaling(scale=(0.5, 3.0), bias=(9.0, 9.0))
    assert evaluation.mae(scaling, TARGETS) == {"shear": 0.25, "bulk": 3.0}
