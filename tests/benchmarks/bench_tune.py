"""What a search costs beside its training: overhead a trial, and the speed-up of trials at once.

    crystalformer bench tune [--trials 3] [--epochs 24] [--at_once 2]

Every trial uses one torch thread. ``overhead``: a trial's time from its suggestion to its end, over the time of its
training alone (epochs with validation, as metrics.jsonl has them), trials one after another on a fresh copy of the
data, so that neighbour lists have to be found; the first trial also starts its process. ``speed-up``: trials of equal
cost, one after another and then at once.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import optuna

from cluster.log import say
from cluster.run.report import read_metrics
from cluster.session import ray_session
from data_pipeline.prepare import prepare_dataset
from tests.benchmarks.measure import environment
from tests.benchmarks.options import Parser, positive, some_of
from tune.folder import Search, new_search
from tune.search import search
from tune.study import open_storage

SAME = "lr: {log: [4e-4, 6e-4]}\n"
"""Trials of equal cost."""

UNLIKE = "scale_real: {log: [1.0, 1.6]}\n"
"""Trials whose neighbours reach 8.5 to 13.6 Å."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one search, seconds: from the first suggestion to the last end, each trial's, each trial's training."""

    span: float
    trials: list[float]
    training: list[float]


def timed(plan: Search) -> Timing:
    """Run a search that stops no trial early."""
    trials = search(plan).trials
    study = optuna.load_study(study_name=plan.study_name, storage=open_storage(plan.url))
    first = min(trial.datetime_start for trial in study.trials)
    last = max(trial.datetime_complete for trial in study.trials)
    training = [read_metrics(plan.folder / "trials" / f"{t.number:04d}")[-1]["seconds"] for t in trials]
    return Timing(
        span=(last - first).total_seconds(), trials=[float(t.seconds or "nan") for t in trials], training=training
    )


def main(arguments: Sequence[str]) -> None:
    """Measure and print a table and a line of JSON."""
    parser = Parser("tune", __doc__)
    parser.add_argument("--trials", type=positive, default=3)
    parser.add_argument("--epochs", type=positive, default=24, help="of the trials of the overhead")
    parser.add_argument("--at_once", type=positive, default=2)
    parser.add_argument("--rows", type=some_of("overhead", "speed-up"), default="overhead,speed-up")
    args = parser.parse_args(list(arguments))
    rows = args.rows
    found = environment("cpu")
    with tempfile.TemporaryDirectory(prefix="crystalformer-bench-") as name, ray_session():
        folder = Path(name)
        prepare_dataset("elastic_tensor_2015", folder / "data")
        for space, text in (("same", SAME), ("unlike", UNLIKE)):
            (folder / f"{space}.yaml").write_text(text, encoding="utf-8")

        def plan(run: str, epochs: int, **given: object) -> Search:
            settings = {
                "target": ["shear"],
                "data_dir": str(folder / "data"),
                "storage_path": str(folder),
                "run_name": run,
                "threads_per_worker": 1,
            }
            own = {"epochs": epochs, "grace_epochs": epochs, **given}
            return new_search(settings, own, datetime.now())

        if "overhead" in rows:
            unlike = {"num_trials": args.trials, "space": str(folder / "unlike.yaml")}
            one = timed(plan("overhead", args.epochs, concurrent=1, **unlike))
            found["overhead"] = [t / alone - 1 for t, alone in zip(one.trials, one.training, strict=True)]
            for number, (seconds, alone) in enumerate(zip(one.trials, one.training, strict=True)):
                say(f"overhead  trial {number}: {seconds:.1f} s, training {alone:.1f} s, {seconds / alone - 1:+.1%}")
            alone = sum(one.training)
            say(f"overhead  all: {one.span:.1f} s, training {alone:.1f} s, {one.span / alone - 1:+.1%}")
        if "speed-up" in rows:
            same = {"num_trials": 2 * args.at_once, "space": str(folder / "same.yaml")}
            epochs = max(1, args.epochs // 3)
            spans = [timed(plan(f"at-once-{n}", epochs, concurrent=n, **same)).span for n in (1, args.at_once)]
            found["speed_up"] = spans[0] / spans[1]
            say(
                f"speed-up  {same['num_trials']} trials: {spans[0]:.1f} s one by one, {spans[1]:.1f} s "
                f"{args.at_once} at once, {spans[0] / spans[1]:.2f} times faster"
            )
    say(json.dumps(found))
