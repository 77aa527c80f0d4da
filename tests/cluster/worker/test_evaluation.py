"""Evaluating over workers: every crystal once, the same numbers on each and on one worker alone."""

import numpy as np
import pytest
import torch

from cluster.data.feed import TargetScaling
from cluster.worker import evaluation as module
from cluster.worker.evaluation import Evaluation, evaluate
from tests.cluster.small import TARGETS, small_config, small_crystals
from tests.cluster.worker.test_engine import feed_of, new_engine


@pytest.fixture(scope="module")
def crystals(small_tables):
    return small_crystals(small_tables["train"], 24)


def evaluate_here(place, tables, flat, at_once) -> Evaluation:
    engine, feed = new_engine(place, tables, flat)
    module.EVAL_BATCH = at_once
    return evaluate(engine, feed, place)


@pytest.mark.parametrize(("size", "stage", "at_once"), [(1, 0, 5), (2, 0, 24), (2, 2, 7), (2, 3, 3), (3, 3, 9)])
def test_every_crystal_is_predicted_once(workers, crystals, size, stage, at_once):
    """Worker's shares differ in length, and at stage 3 each forward is collective all the same."""
    flat = small_config(zero_stage=stage).to_flat()
    alone = workers(1).run(evaluate_here, crystals, small_config().to_flat(), 24)[0]
    found = workers(size).run(evaluate_here, crystals, flat, at_once)
    _, target = feed_of(crystals).batch(np.arange(24), torch.device("cpu"))
    for one in found:
        assert np.array_equal(one.truth, target.double().numpy())
        assert np.array_equal(one.prediction, found[0].prediction)
        assert one.prediction == pytest.approx(alone.prediction, rel=1e-4, abs=1e-6)
    assert len(np.unique(alone.prediction[:, 0])) == 24


def test_errors_are_means_in_units():
    evaluation = Evaluation(prediction=np.array([[1.0, 0.0], [0.0, 2.0]]), truth=np.zeros((2, 2)))
    assert evaluation.score == 0.75
    scaling = TargetScaling(scale=(0.5, 3.0), bias=(9.0, 9.0))
    assert evaluation.mae(scaling, TARGETS) == {"shear": 0.25, "bulk": 3.0}
