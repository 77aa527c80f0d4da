"""``crystalformer predict``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import Incomplete, UserError, without_credentials
from cluster.log import say
from cluster.paths import lasting, there
from data_pipeline.text import printable

if TYPE_CHECKING:
    from cluster.prediction.inputs import Found, Piece
    from cluster.prediction.predict import Ensemble

HELP = "predict properties of structures with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which models, which structures, and where the table goes."""
    from cluster.commands.options import add_device

    parser.add_argument(
        "model",
        metavar="MODEL",
        help="model folder, such as runs/NAME/model, also s3://...; several joined by commas predict their mean and "
        "spread",
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        type=there,
        metavar="INPUT",
        help="CIF, POSCAR or another file that pymatgen reads, JSON with one structure or records, a folder of such "
        "files, or a structure table (Parquet file, or folder such as data/NAME/test)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=lasting,
        help="write to a .csv, .jsonl or .parquet file (default: a table on the screen)",
    )
    parser.add_argument(
        "--batch_size", type=int, metavar="N", help="structures at once at most (default: as memory allows)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where an earlier command was stopped: of very many structures, those done lie in OUTPUT.parts",
    )
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Predict all that can be read.

    UserError for the model or options and where nothing could be read, Incomplete where an input was left out.
    """
    if args.batch_size is not None and args.batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {args.batch_size}")
    import torch

    from cluster.prediction.answers import check_output
    from cluster.prediction.predict import Ensemble, pick_device

    if args.output is not None and "://" in args.output:
        raise UserError(
            f"output must be a path, which all nodes see where there are several, got "
            f"{without_credentials(args.output)!r}"
        )
    output = None if args.output is None else Path(args.output)
    if output is not None:
        check_output(output)
    folders = model_folders(args.model)
    elsewhere = args.device == "cuda" and not torch.cuda.is_available()  # as on the head of a cluster
    models = Ensemble(folders, pick_device("cpu" if elsewhere else args.device))
    from cluster.prediction.inputs import STREAM_FROM, plan_pieces

    pieces = plan_pieces(args.inputs)
    count = sum(piece.count for piece in pieces)
    if count < STREAM_FROM:
        pick_device(args.device)
        done, left_out = predict_here(models, pieces, output, args.batch_size)
    elif output is None:
        raise UserError(f"--output is needed for {count} structures")
    else:
        done, left_out = screen(args, folders, pieces, output, models)
    if left_out and not done:
        raise UserError(f"none of {left_out} structures could be read")
    if output is not None:
        say(f"{done} predictions in {output}")
    if left_out:
        raise Incomplete(f"{left_out} of {left_out + done} structures could not be read")


def predict_here(
    models: Ensemble, pieces: list[Piece], output: Path | None, batch_size: int | None
) -> tuple[int, int]:
    """Predict in this process; numbers of predictions and of structures left out. UserError where that is all."""
    from cluster.prediction.answers import TableFile, as_table
    from cluster.prediction.inputs import read_piece
    from cluster.prediction.predict import row

    unread: list[Found] = []
    readable = report_unread((found for piece in pieces for found in read_piece(piece)), unread)
    rows = [row(prediction) for prediction in models.predict(readable, batch_size)]
    if unread and not rows:
        first = f"{unread[0].where}: {unread[0].problem}"
        raise UserError(first if len(unread) == 1 else f"none of {len(unread)} structures could be read; {first}")
    if output is None:
        say(as_table(models.header, rows))
    else:
        with TableFile(output, models.header) as file:
            file.add(rows)
    return len(rows), len(unread)


def screen(
    args: argparse.Namespace, folders: list[str], pieces: list[Piece], output: Path, models: Ensemble
) -> tuple[int, int]:
    """Predict very many structures through Ray; numbers of predictions and of structures left out."""
    from cluster.prediction.screening import Screening, predict_many  # Ray takes seconds to import
    from cluster.run.progress import counting

    job = Screening(
        models=tuple(folders),
        pieces=tuple(pieces),
        output=output,
        device=args.device,
        batch_size=args.batch_size,
    )
    with counting() as progress:
        done, left_out = predict_many(job, models.seen, models.header, progress, resume=args.resume)
    return done, left_out


def model_folders(text: str) -> list[str]:
    """The folders of MODEL: one, or several joined by commas."""
    whole = there(text)
    if os.path.isdir(whole):
        return [whole]
    names = text.split(",")
    if not all(names):
        raise UserError(f"MODEL must be folders joined by commas, got {without_credentials(text)!r}")
    return [there(name) for name in names]


def report_unread(found: Iterable[Found], unread: list[Found]) -> Iterator[Found]:
    """Those that were read; the others are told on stderr as they come, and added to ``unread``.

    The first waits for another structure: where it is the only one, it is the error that the command ends with.
    """
    told = 0
    for one in found:
        if one.problem is not None:
            unread.append(one)
        if one.problem is None or len(unread) > 1:
            for other in unread[told:]:
                sys.stderr.write(printable(f"{other.where}: {other.problem}") + "\n")
            told = len(unread)
        if one.problem is None:
            yield one
