"""``crystalformer info``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.log import say

if TYPE_CHECKING:
    from data_pipeline.info import DatasetInfo, TargetInfo
    from data_pipeline.prepared import PreparedDataset

HELP = "show what is known of a data set, or list the data sets"

_INDENT = 11
"""Columns before the values."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The data set, and where prepared ones lie."""
    parser.add_argument(
        "dataset", nargs="?", metavar="DATASET", help="name of a data set; without it, all are listed"
    )
    add_data_dir(parser)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """The option for the folder of prepared data sets, as a training run has it."""
    from cluster.config import flat_fields

    spec = flat_fields()["data_dir"]
    parser.add_argument(
        "--data_dir", metavar="FOLDER", default=spec.default, help=f"{spec.help} (default {spec.default})"
    )


def run(args: argparse.Namespace) -> None:
    """Print the lines. Raises DataError for a name that is neither registered nor prepared."""
    data_dir = Path(args.data_dir)
    lines = list_datasets() if args.dataset is None else describe_dataset(args.dataset, data_dir)
    say("\n".join(lines))


def list_datasets() -> list[str]:
    """A line for each registered data set: name, where it comes from, targets with units."""
    from data_pipeline.registry import DATASETS

    width = max(len(info.name) for info in DATASETS)
    return [f"{info.name:{width}}  {info.kind:9}  {_names(info.targets)}" for info in DATASETS]


def describe_dataset(name: str, data_dir: Path) -> list[str]:
    """All that is known of a data set, prepared under ``data_dir`` or not."""
    from data_pipeline.datasets import find_dataset
    from data_pipeline.errors import DataError
    from data_pipeline.prepared import is_prepared, load_prepared

    try:
        info = find_dataset(name)
    except DataError:
        if not is_prepared(data_dir, name):
            raise
        return prepared_lines(load_prepared(data_dir, name))
    if is_prepared(data_dir, info.name):
        return prepared_lines(load_prepared(data_dir, info.name))
    return _registered_lines(info)


def _registered_lines(info: DatasetInfo) -> list[str]:
    lines = [_line("name", info.name), *_target_lines(info.targets)]
    if info.expected is not None:
        sizes = info.expected
        lines.append(_line("splits", f"train {sizes.train}, val {sizes.val}, test {sizes.test} (as published)"))
    lines.append(_line("prepared", f"no; crystalformer prepare {info.name}"))
    return [*lines, *_origin(info)]


def prepared_lines(prepared: PreparedDataset) -> list[str]:
    """What its dataset.json says of a prepared data set."""
    sizes = prepared.sizes
    lines = [
        _line("name", prepared.name),
        *_target_lines(prepared.targets),
        _line("splits", f"train {sizes.train}, val {sizes.val}, test {sizes.test}"),
    ]
    for target in prepared.targets:
        numbers = prepared.statistics[target.name]
        lines.append(_line("train", f"{target.name} mean {numbers.mean:.5g}, std {numbers.std:.5g} {target.unit}"))
    lines.append(_line("elements", f"{len(prepared.elements)}: {' '.join(prepared.elements)}"))
    lines.append(_line("rejected", f"{len(prepared.rejected)} rows"))
    lines += [f"{'':{_INDENT}}{row.file} row {row.row} {row.material_id}: {row.reason}" for row in prepared.rejected]
    lines.append(_line("prepared", str(prepared.path)))
    return [*lines, *_origin(prepared)]


def _target_lines(targets: Iterable[TargetInfo]) -> list[str]:
    return [_line("target", f"{target.name} [{target.unit}]: {target.description}") for target in targets]


def _origin(described: DatasetInfo | PreparedDataset) -> list[str]:
    values = {"source": described.source, "citation": described.citation, "licence": described.licence}
    return [_line(label, value) for label, value in values.items() if value]


def _names(targets: Iterable[TargetInfo]) -> str:
    return ", ".join(f"{target.name} [{target.unit}]" for target in targets)


def _line(label: str, value: str) -> str:
    return f"{label:{_INDENT}}{value}"
