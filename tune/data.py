"""The prepared data of a search, and whether its trials can have it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.config import TrainConfig
from cluster.errors import UserError
from cluster.progress import counting
from cluster.tables import cached_structures
from data_pipeline.datasets import resolve
from data_pipeline.info import SourceKind
from data_pipeline.prepare import prepare_dataset
from data_pipeline.prepared import PreparedDataset, load_prepared
from data_pipeline.table import StructureTable
from tune.library import TRIAL_SPLITS
from tune.space import Space


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchData:
    """What the trials of a search learn from."""

    dataset: PreparedDataset
    units: dict[str, str]
    """By target."""
    rows: int
    """Training crystals that have every target."""


def search_data(config: TrainConfig, space: Space) -> SearchData:
    """The data, prepared if need be. DataError, UserError; one of them where no trial can have its batch_size."""
    dataset = prepared(config)
    rows = _table(dataset, "train", config).num_rows
    searched = [parameter for parameter in space.parameters if parameter.name == "batch_size"]
    sizes = [size for parameter in searched for size in parameter.extremes()]
    if not searched or searched[0].condition is not None:
        sizes.append(config.data.batch_size)
    if min(sizes) > rows:
        raise UserError(f"batch_size must be at most the {rows} training crystals, got {min(sizes)}")
    units = {target.name: target.unit for target in dataset.targets if target.name in config.data.target}
    return SearchData(dataset=dataset, units=units, rows=rows)


def _table(dataset: PreparedDataset, split: str, config: TrainConfig) -> StructureTable:
    return StructureTable.from_arrow(cached_structures(dataset, split, config.data.target), config.data.target)


def prepared(config: TrainConfig) -> PreparedDataset:
    """The data set, prepared if need be; its splits hold crystals. DataError, UserError."""
    data_dir = Path(config.data.data_dir).resolve()
    found = resolve(config.data.dataset, config.data.target, data_dir)
    if found.info.kind is SourceKind.OWN:
        dataset = load_prepared(data_dir, found.name)
    else:
        with counting() as progress:
            dataset = prepare_dataset(found.info, data_dir, progress=progress)
    for split in TRIAL_SPLITS:
        if _table(dataset, split, config).num_rows == 0:
            wanted = ", ".join(config.data.target)
            raise UserError(f"dataset {config.data.dataset!r} has no {split} row with {wanted}")
    return dataset
