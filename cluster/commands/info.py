"""``crystalformer info``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError, without_credentials
from cluster.log import say
from cluster.paths import lasting, there
from data_pipeline.errors import DataError
from data_pipeline.text import printable

if TYPE_CHECKING:
    from data_pipeline.info import DatasetInfo, TargetInfo

HELP = "show what is in a data set or a model folder, or list the data sets"

_INDENT = 11
"""Columns before the values."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The data set, where prepared ones lie, and whether to draw it."""
    from cluster.commands.options import add_data_dir

    parser.add_argument(
        "dataset",
        nargs="?",
        metavar="DATASET|MODEL",
        help="name of a data set, or a model folder such as runs/NAME/model; without it, all data sets are listed",
    )
    parser.add_argument(
        "--plot",
        nargs="?",
        const="",
        metavar="FILE",
        help="also draw what a prepared data set holds (default FILE: its name with .png, in this folder)",
    )
    add_data_dir(parser)


def run(args: argparse.Namespace) -> None:
    """Print the lines. Raises UserError or DataError for a name that is unknown, or not prepared where it must be."""
    data_dir = Path(args.data_dir)
    if args.dataset is None:
        if args.plot is not None:
            raise UserError("--plot needs DATASET: the name of a prepared data set")
        say("\n".join(list_datasets()))
        return
    model = there(args.dataset)
    if "://" in model or is_model(Path(model)):
        if args.plot is not None:
            raise UserError(f"--plot draws data sets, and {without_credentials(args.dataset)} is a model folder")
        say("\n".join(describe_model(model)))
        return
    say("\n".join(describe_dataset(args.dataset, data_dir)))
    if args.plot is not None:
        say(f"plot      {draw_dataset(args.dataset, data_dir, args.plot)}")


def is_model(folder: Path) -> bool:
    """Whether a model folder is meant: one that has a card, or weights that lack it."""
    # The names are crystalformer.artifact's, which would bring torch.
    return any((folder / name).is_file() for name in ("config.json", "model.safetensors"))


def describe_model(location: str | Path) -> list[str]:
    """Targets with units, architecture, ranges and provenance of a model folder. UserError for an unreadable card."""
    from cluster.run.report import labelled
    from cluster.run.storage import local_folder
    from crystalformer.artifact import read_card

    try:
        with local_folder(str(location), "MODEL") as folder:
            card = read_card(folder)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    lines = [_line("model", str(location))]
    for target in card.targets:
        name = labelled(target.name, target.unit)
        lines.append(_line("target", f"{name} = output * {target.scale:.6g} + {target.bias:.6g}"))
    for name, value in card.model.to_dict().items():
        lines.append(_line("setting", f"{name} {_words(value)}"))
    if card.ranges is not None:
        sizes, densities = card.ranges.cell_sizes, card.ranges.number_densities
        lines.append(_line("seen", f"cells of {sizes[0]} to {sizes[1]} atoms"))
        lines.append(_line("seen", f"densities of {densities[0]:.4f} to {densities[1]:.4f} atoms/Å³"))
    for name, value in card.provenance.items():
        lines.append(_line("origin", f"{name}: {_words(value)}"))
    return lines


def _words(value: object) -> str:
    """A value of the card as a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(_words(item) for item in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def list_datasets() -> list[str]:
    """A line for each registered data set: name, where it comes from, targets with units."""
    from data_pipeline.registry import DATASETS

    width = max(len(info.name) for info in DATASETS)
    return [f"{info.name:{width}}  {info.kind:9}  {_names(info.targets)}" for info in DATASETS]


def describe_dataset(name: str, data_dir: Path) -> list[str]:
    """All that is known of a data set, prepared under ``data_dir`` or not."""
    from data_pipeline.datasets import find_dataset
    from data_pipeline.prepared import is_prepared

    own_name = prepared_name(name, data_dir)
    if is_prepared(data_dir, own_name):
        from data_pipeline.describe import describe

        return [describe(data_dir, own_name)]
    return _registered_lines(find_dataset(name))


def prepared_name(name: str, data_dir: Path) -> str:
    """The folder under ``data_dir`` that a data set called ``name`` has or would have.

    Raises DataError for a name that is neither registered nor prepared.
    """
    from data_pipeline.datasets import find_dataset
    from data_pipeline.prepared import is_prepared

    try:
        return find_dataset(name).name
    except DataError:
        if not is_prepared(data_dir, name):
            raise
        return name


def draw_dataset(name: str, data_dir: Path, file: str) -> Path:
    """Draw a prepared data set into ``file`` (empty: <name>.png). UserError where it cannot be written."""
    from data_pipeline.describe import plot

    folder = prepared_name(name, data_dir)
    out = Path(lasting(file or f"{folder}.png"))
    try:
        return plot(data_dir, folder, out)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise UserError(f"--plot {out}: {getattr(error, 'strerror', None) or error}") from error


def _registered_lines(info: DatasetInfo) -> list[str]:
    from cluster.run.report import labelled

    lines = [_line("name", info.name)]
    lines += [_line("target", f"{labelled(t.name, t.unit)}: {t.description}") for t in info.targets]
    if info.expected is not None:
        sizes = info.expected
        lines.append(_line("splits", f"train {sizes.train}, val {sizes.val}, test {sizes.test} (as published)"))
    lines.append(_line("prepared", f"no; crystalformer prepare {info.name}"))
    origin = {"source": info.source, "citation": info.citation, "licence": info.licence}
    return [*lines, *(_line(label, value) for label, value in origin.items() if value)]


def _names(targets: Iterable[TargetInfo]) -> str:
    from cluster.run.report import labelled

    return ", ".join(labelled(target.name, target.unit) for target in targets)


def _line(label: str, value: str) -> str:
    return f"{label:{_INDENT}}{printable(value)}"
