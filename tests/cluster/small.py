"""A small model and real crystals for tests that train."""

import numpy as np
import pyarrow as pa

from cluster.data.tables import SplitTables
from cluster.settings.config import TrainConfig
from crystalformer.config import ModelConfig
from data_pipeline.table import StructureTable

SMALL = {
    "num_layers": 2,
    "model_dim": 32,
    "head_num": 2,
    "ff_dim": 64,
    "embedding_dim": [32],
    "value_pe_dist_real": 16,
    "scale_real": 0.9,
}
SMALL_MODEL = ModelConfig(**SMALL, num_targets=2)

TARGETS = ("shear", "bulk")


def small_config(**settings) -> TrainConfig:
    """The small model on shear and bulk; ``settings`` by flat name."""
    return TrainConfig.from_flat({"target": TARGETS, "batch_size": 8, **SMALL, **settings})


def small_crystals(tables: SplitTables, count: int) -> SplitTables:
    """The first ``count`` crystals of at most 8 atoms, of unlike sizes, with their shells."""
    sizes = StructureTable.from_arrow(tables.structures).sizes
    rows = pa.array(np.flatnonzero(sizes <= 8)[:count])
    return SplitTables(structures=tables.structures.take(rows), shells=tables.shells.take(rows))
