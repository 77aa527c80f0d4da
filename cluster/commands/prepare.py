"""``crystalformer prepare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.commands.info import add_data_dir, prepared_lines
from cluster.log import say

HELP = "download and preprocess a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data set, and where to put it."""
    parser.add_argument("dataset", metavar="DATASET", help="name of a data set; crystalformer info lists them")
    parser.add_argument(
        "--strict", action="store_true", help="refuse the data set if a single row of it has to be rejected"
    )
    add_data_dir(parser)


def run(args: argparse.Namespace) -> None:
    """Prepare it unless it is prepared already, and describe it."""
    from cluster.progress import counting
    from data_pipeline.prepare import prepare_dataset

    with counting() as progress:
        prepared = prepare_dataset(args.dataset, Path(args.data_dir), strict=args.strict, progress=progress)
    say("\n".join(prepared_lines(prepared)))
