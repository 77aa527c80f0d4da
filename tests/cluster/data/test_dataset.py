"""The data set of a command, found and prepared."""

import pytest

from cluster.data.dataset import dataset_of, require_rows, units_of
from cluster.data.tables import cached_structures
from cluster.errors import UserError
from data_pipeline.table import StructureTable
from tests.cluster.small import TARGETS, small_config


def test_a_run_without_a_dataset_gets_the_embedded_one_prepared_once(tmp_path):
    config = small_config(data_dir=str(tmp_path))
    made = dataset_of(config)
    assert (made.name, made.reused, made.path) == ("elastic_tensor_2015", False, tmp_path / "elastic_tensor_2015")
    again = dataset_of(config)
    assert (again.fingerprint, again.reused) == (made.fingerprint, True)


def test_units_are_of_the_targets_asked_for(elastic):
    assert units_of(elastic, ["bulk"]) == {"bulk": "log10(GPa)"}
    assert units_of(elastic, TARGETS) == {"shear": "log10(GPa)", "bulk": "log10(GPa)"}


def test_a_split_without_rows_is_refused(elastic):
    structures = StructureTable.from_arrow(cached_structures(elastic, "val", TARGETS), TARGETS)
    require_rows(structures, elastic, "val", TARGETS)
    empty = StructureTable.from_arrow(cached_structures(elastic, "val", TARGETS).slice(0, 0), TARGETS)
    with pytest.raises(UserError, match="dataset 'elastic_tensor_2015' has no val row with shear, bulk"):
        require_rows(empty, elastic, "val", TARGETS)
