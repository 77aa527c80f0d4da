"""``crystalformer prepare``."""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.log import say
from cluster.paths import lasting
from data_pipeline.info import SplitRecipe
from data_pipeline.text import printable

if TYPE_CHECKING:
    from data_pipeline.own import OwnData
    from data_pipeline.prepared import PreparedDataset

HELP = "download and preprocess a data set, or make one of your own structures"

_RECIPE = SplitRecipe()
_RATIOS = ",".join(map(str, _RECIPE.ratios))

OWN_ONLY = ("name", "split", "seed", "targets")
"""Options that say what to make of --source; a registered data set brings its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data set, or whose structures under which name, and where to put it."""
    from cluster.commands.options import add_data_dir

    parser.usage = "%(prog)s DATASET | --source PATH --name NAME [options]"
    parser.add_argument(
        "dataset", nargs="?", metavar="DATASET", help="name of a data set; crystalformer info lists them"
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse the data set if a single row of it has to be rejected"
    )
    parser.add_argument(
        "--allow_pickle",
        action="store_true",
        help="read pickles, through an unpickler that admits nothing but plain data",
    )
    add_data_dir(parser)
    own = parser.add_argument_group("your own structures")
    own.add_argument(
        "--source",
        metavar="PATH",
        help="folder of CIF or POSCAR files with id_prop.csv; CSV, JSON, JSON.gz or Parquet file, "
        "or a folder of them; folder of {train,val,test}/raw/raw_data.pkl",
    )
    own.add_argument("--name", help="name of the data set to be; what train --dataset then takes")
    own.add_argument(
        "--split",
        metavar="X,X,X",
        help=f"parts for train, val and test (default {_RATIOS}; a source may bring splits)",
    )
    own.add_argument("--seed", type=int, metavar="N", help=f"seed of the split (default {_RECIPE.seed})")
    own.add_argument("--targets", metavar="NAME,..", help="columns to predict (default: every column of numbers)")


def run(args: argparse.Namespace) -> None:
    """Prepare it unless it is prepared already, and say what came of it."""
    check_words(args)
    from cluster.run.progress import counting
    from data_pipeline.own import prepare_source
    from data_pipeline.prepare import prepare_dataset

    data_dir = Path(args.data_dir)
    own = None if args.source is None else own_data(args)
    with counting() as progress:
        if own is not None:
            prepared = prepare_source(own, data_dir, strict=args.strict, progress=progress)
        else:
            prepared = prepare_dataset(
                args.dataset, data_dir, strict=args.strict, allow_pickle=args.allow_pickle, progress=progress
            )
    say("\n".join(map(printable, summary(prepared))))


def check_words(args: argparse.Namespace) -> None:
    """UserError for options that do not go together."""
    if args.source is None:
        if args.dataset is None:
            raise UserError("give DATASET, or --source PATH and --name NAME (crystalformer info lists the data sets)")
        for option in OWN_ONLY:
            if getattr(args, option) is not None:
                raise UserError(f"--{option} goes with --source, not with the data set {args.dataset!r}")
    elif args.dataset is not None:
        raise UserError(f"give DATASET or --source, not both: got {args.dataset!r} and --source {args.source!r}")
    elif args.name is None:
        raise UserError(f"--source {args.source!r} needs --name: what to call the data set")


def own_data(args: argparse.Namespace) -> OwnData:
    """What --source and the options beside it ask for. UserError or DataError for what they cannot mean."""
    from data_pipeline.own import OwnData

    given: dict[str, object] = {}
    if args.split is not None:
        given["split"] = _ratios(args.split)
    if args.seed is not None:
        given["seed"] = args.seed
    if args.targets is not None:
        names = tuple(name.strip() for name in args.targets.split(","))
        if not all(names):
            raise UserError(f"--targets must be column names joined by commas, got {args.targets!r}")
        given["targets"] = names
    return OwnData(path=Path(args.source), name=args.name, allow_pickle=args.allow_pickle, **given)  # type: ignore[arg-type]


def _ratios(text: str) -> tuple[float, ...]:
    """As many numbers as were given: OwnData judges them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--split must be three numbers joined by commas, such as {_RATIOS}, got {text!r}") from None


def summary(prepared: PreparedDataset) -> list[str]:
    """Sizes, rejected rows with their reasons, where it lies, and what to do with it, as commands that work there."""
    from cluster.run.report import labelled
    from cluster.settings.config import flat_fields
    from data_pipeline.describe import rejected_lines

    sizes, own = prepared.sizes, prepared.own_splits
    data_dir = prepared.path.parent
    default = Path(lasting(flat_fields()["data_dir"].default))
    place = "" if data_dir == default else f" --data_dir {quote(str(data_dir))}"
    targets = ", ".join(labelled(t.name, t.unit) for t in prepared.targets)
    return [
        f"{prepared.name}: {sizes.train} train, {sizes.val} val, {sizes.test} test; targets {targets}",
        *(["splits    the source's own: its column or files name them, not --split and --seed"] if own else []),
        *rejected_lines(prepared),
        f"prepared  {prepared.path}",
        f"look      crystalformer info {prepared.name}{place}",
        f"train     crystalformer train --dataset {prepared.name} --target {prepared.target_names[0]}{place}",
    ]
