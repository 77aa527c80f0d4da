"""``crystalformer predict``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import Incomplete, UserError
from cluster.log import say

if TYPE_CHECKING:
    from cluster.inputs import Found

HELP = "predict properties of structures with a trained model"

BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models, which structures, and where the table goes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="model folder, such as runs/NAME/model; several joined by commas predict their mean and spread",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="CIF, POSCAR or another file that pymatgen reads, a folder of them, or a structure table "
        "(Parquet file, or folder such as data/NAME/test)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write to a .csv, .jsonl or .parquet file (default: a table on the screen)"
    )
    parser.add_argument(
        "--batch_size", type=int, default=BATCH, metavar="N", help=f"structures at once at most (default {BATCH})"
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option for where a model computes."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto: on a GPU where there is one (default auto)",
    )


def run(args: argparse.Namespace) -> None:
    """Predict all that can be read. UserError for the model or options, Incomplete where an input was left out."""
    if args.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {args.batch_size}")
    from cluster.predict import Ensemble, as_table, check_output, pick_device, row, write_rows

    output = None if args.output is None else Path(args.output)
    if output is not None:
        check_output(output)
    models = Ensemble(model_folders(args.model), pick_device(args.device))
    from cluster.inputs import find_structures

    unread: list[Found] = []
    readable = report_unread(find_structures(args.inputs), unread)
    rows = [row(prediction) for prediction in models.predict(readable, args.batch_size)]
    if output is None:
        say(as_table(models.header, rows))
    else:
        write_rows(output, models.header, rows)
        say(f"{len(rows)} predictions in {output}")
    if unread:
        raise Incomplete(f"{len(unread)} of {len(unread) + len(rows)} structures could not be read")


def model_folders(text: str) -> list[str]:
    """The folders of MODEL: one, or several joined by commas."""
    if Path(text).is_dir():
        return [text]
    names = text.split(",")
    if not all(names):
        raise UserError(f"MODEL must be folders joined by commas, got {text!r}")
    return names


def report_unread(found: Iterable[Found], unread: list[Found]) -> Iterator[Found]:
    """Those that were read; the others are told on stderr as they come, and added to ``unread``."""
    for one in found:
        if one.problem is None:
            yield one
            continue
        sys.stderr.write(f"{one.where}: {one.problem}\n")
        unread.append(one)
