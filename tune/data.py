"""The prepared data of a search."""

from __future__ import annotations

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
        table = StructureTable.from_arrow(cached_structures(dataset, split, config.data.target), config.data.target)
        if table.num_rows == 0:
            wanted = ", ".join(config.data.target)
            raise UserError(f"dataset {config.data.dataset!r} has no {split} row with {wanted}")
    return dataset
