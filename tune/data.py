"""The prepared data of a search, and whether its trials can have it."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.data.dataset import dataset_of, require_batch, require_rows, units_of
from cluster.data.tables import cached_structures
from cluster.settings.config import TrainConfig
from data_pipeline.prepared import PreparedDataset
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
    dataset, targets = dataset_of(config), config.data.target
    rows = {}
    for split in TRIAL_SPLITS:
        table = StructureTable.from_arrow(cached_structures(dataset, split, targets), targets)
        require_rows(table, dataset, split, targets)
        rows[split] = table.num_rows
    searched = [parameter for parameter in space.parameters if parameter.name == "batch_size"]
    sizes = [size for parameter in searched for size in parameter.extremes()]
    if not searched or searched[0].condition is not None:
        sizes.append(config.data.batch_size)
    require_batch(min(sizes), rows["train"])
    return SearchData(dataset=dataset, units=units_of(dataset, targets), rows=rows["train"])
