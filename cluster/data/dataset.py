"""The data set that a command works on: found, prepared where need be, and with rows to work on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.errors import UserError
from cluster.log import say
from cluster.run.progress import counting
from cluster.settings.config import TrainConfig
from data_pipeline.datasets import ResolvedDataset, resolve
from data_pipeline.info import SourceKind
from data_pipeline.prepare import prepare_dataset
from data_pipeline.prepared import PreparedDataset, load_prepared
from data_pipeline.table import StructureTable


def dataset_of(config: TrainConfig) -> PreparedDataset:
    """The data set of a run, as ``prepared_for`` gives it. DataError, also where the set or a target is unknown."""
    data_dir = Path(config.data.data_dir).resolve()
    return prepared_for(resolve(config.data.dataset, config.data.target, data_dir), data_dir)


def prepared_for(found: ResolvedDataset, data_dir: Path) -> PreparedDataset:
    """The prepared data set under ``data_dir``, made now where it is not there; says how many rows that rejected.

    DataError where it cannot be prepared or read; the user's own sets must be there.
    """
    if found.info.kind is SourceKind.OWN:
        return load_prepared(data_dir, found.name)
    with counting() as progress:
        dataset = prepare_dataset(found.info, data_dir, progress=progress)
    if dataset.rejected and not dataset.reused:
        say(f"{dataset.name}: {len(dataset.rejected)} rows rejected, listed in {dataset.path / 'dataset.json'}")
    return dataset


def units_of(dataset: PreparedDataset, targets: Sequence[str]) -> dict[str, str]:
    """The units of ``targets``, by name."""
    return {target.name: target.unit for target in dataset.targets if target.name in targets}


def require_rows(structures: StructureTable, dataset: PreparedDataset, split: str, targets: Sequence[str]) -> None:
    """UserError where no row of the split, of which ``structures`` holds those with every target, is left."""
    if structures.num_rows == 0:
        raise UserError(f"dataset {dataset.name!r} has no {split} row with {', '.join(targets)}")


def require_batch(batch_size: int, rows: int) -> None:
    """UserError where a batch would need more than the ``rows`` training crystals."""
    if batch_size > rows:
        raise UserError(f"batch_size must be at most the {rows} training crystals, got {batch_size}")
