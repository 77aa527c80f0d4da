"""Tuner.fit, followed from outside: Ray Tune at work on a search's trials, ended where nobody waits for it."""

from __future__ import annotations

import logging
import os
import threading
import time

from ray import tune as ray_tune
from ray.tune import CheckpointConfig, FailureConfig, PlacementGroupFactory

from cluster.driver.actors import give_back_reservations, kill_actors
from tune.adapters import Ending, StudyScheduler, StudySearcher
from tune.book import Book
from tune.folder import Search
from tune.worker import Trial, TrialSetup

END_SECONDS = 10.0
"""For Ray Tune to end once the trials are killed; it takes one or two."""

TUNE_FOLDER = ".ray"
"""Ray Tune's own files, of no use after the search."""

_ENVIRONMENT = {
    # A row an epoch is in the trial's folder already; TensorBoard, CSV and JSON loggers would write it thrice more.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # The study is what a search goes on from, not Ray Tune's own snapshots.
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    # Results hold lists.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}

_LOUD = tuple(
    f"ray.tune.{name}"
    for name in (
        "analysis.experiment_analysis",
        "execution.experiment_state",
        "execution.tune_controller",
        "tune",
        "utils.util",
    )
)
"""Loggers of Ray Tune: they miss the files of loggers turned off, repeat failures we tell of, tell of slow steps."""


class Fit(threading.Thread):
    """Tuner.fit in a thread of its own: Ray then leaves the signals to us."""

    def __init__(
        self, plan: Search, book: Book, setup: TrialSetup, resources: PlacementGroupFactory, at_once: int
    ) -> None:
        """``resources``: of a trial. ``at_once``: trials."""
        super().__init__(name="ray-tune-fit", daemon=True)
        self._error: Exception | None = None
        self._ended = False
        minutes = plan.options.max_minutes
        deadline = time.monotonic() + 60 * minutes if minutes else None
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        for name in _LOUD:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        trainable = ray_tune.with_resources(ray_tune.with_parameters(Trial, shared=setup), resources)
        self._actors = trainable.__qualname__  # which is no more Trial's
        self._tuner = ray_tune.Tuner(
            trainable,
            tune_config=ray_tune.TuneConfig(
                search_alg=StudySearcher(book),
                scheduler=StudyScheduler(book),
                num_samples=-1,
                max_concurrent_trials=at_once,
                reuse_actors=plan.config.scale.num_workers.most == 1,
            ),
            run_config=ray_tune.RunConfig(
                name=TUNE_FOLDER,
                storage_path=str(plan.folder),
                verbose=0,
                stop=Ending(deadline, book, setup.library),
                failure_config=FailureConfig(max_failures=plan.options.trial_retries),
                checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            ),
        )

    def run(self) -> None:
        """Fit; an error is kept for ``check``."""
        try:
            self._tuner.fit()
        except Exception as error:  # noqa: BLE001 - raised again by check()
            self._error = error

    def end(self) -> None:
        """Give up, where it has not ended by itself: the trials are killed, wherever they are in an epoch.

        A process that leaves Ray while a thread of it is at work there may be ended by Ray, or starts another Ray.
        """
        deadline = time.monotonic() + END_SECONDS
        while self.is_alive() and time.monotonic() < deadline:
            self._ended = True
            kill_actors(self._actors)
            self.join(0.5)
        if self._ended:
            give_back_reservations()

    def check(self) -> None:
        """Raise what fit raised, but for what came of ``end``."""
        if self._error is not None and not self._ended:
            raise self._error
