"""``crystalformer train``."""

from __future__ import annotations

import argparse
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.log import say

if TYPE_CHECKING:
    from cluster.run.report import RunResult
    from cluster.settings.config import TrainConfig

HELP = "train a model, test it and write a run folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every setting of TrainConfig is an option."""
    from cluster.commands.options import add_config_options

    add_config_options(parser)


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked without Ray, train, and say where the run is and how good it is."""
    from cluster.commands.options import read_config
    from cluster.settings.deepspeed_config import overlay_of

    config = read_config(args)
    overlay_of(config)  # read again at the start of the workers; its faults are told before anything is made
    named = config.run.run_name is not None
    config = find_data(config)
    from cluster.driver.run_folder import with_free_name
    from cluster.driver.trainer import train  # Ray and DeepSpeed take seconds to import

    say("\n".join(summary(train(config if named else with_free_name(config)))))


def find_data(config: TrainConfig) -> TrainConfig:
    """The config with the data set and targets under their own names, and with a run_name.

    Raises DataError where there is no such data set or target.
    """
    from data_pipeline.datasets import resolve

    found = resolve(config.data.dataset, config.data.target, Path(config.data.data_dir))
    return config.resolved(dataset=found.name, target=found.target_names, now=datetime.now())


def summary(result: RunResult) -> list[str]:
    """What the user is told at the end: run folder, errors with units, time."""
    from cluster.run.report import with_unit

    lines = [f"run folder  {result.run_dir}"]
    weights = {f"best validation, epoch {result.best_epoch}": result.test_mae, "averaged": result.test_mae_swa}
    for label, errors in weights.items():
        for target, error in errors.items():
            lines.append(f"test MAE    {target} {with_unit(error, result.units[target])} ({label} weights)")
    lines.append(f"time        {timedelta(seconds=round(result.wall_seconds))}")
    return lines
