"""What tests of training share: worker processes, prepared data, a small model."""

from functools import partial

import pytest

from cluster.data.tables import SPLITS, SplitTables, open_split
from data_pipeline.prepare import prepare_dataset
from data_pipeline.prepared import PreparedDataset
from tests.cluster.processes import Workers
from tests.cluster.small import SMALL_MODEL


def _workers(size, tmp_path_factory):
    workers = Workers(size, str(tmp_path_factory.mktemp(f"workers-{size}")))
    yield workers
    workers.close()


@pytest.fixture(scope="session")
def one_worker(tmp_path_factory):
    yield from _workers(1, tmp_path_factory)


@pytest.fixture(scope="session")
def two_workers(tmp_path_factory):
    yield from _workers(2, tmp_path_factory)


@pytest.fixture(scope="session")
def three_workers(tmp_path_factory):
    yield from _workers(3, tmp_path_factory)


@pytest.fixture(scope="session")
def workers(request):
    """By number of workers; started when first asked for."""
    return lambda size: request.getfixturevalue({1: "one_worker", 2: "two_workers", 3: "three_workers"}[size])


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def elastic(data_dir) -> PreparedDataset:
    """elastic_tensor_2015, prepared."""
    return prepare_dataset("elastic_tensor_2015", data_dir)


@pytest.fixture(scope="session")
def small_tables(elastic) -> dict[str, SplitTables]:
    """Every split of elastic_tensor_2015 for the small model, with its shells."""
    opened = partial(open_split, targets=("shear", "bulk"), around=SMALL_MODEL.neighborhood)
    return {split: opened(elastic, split) for split in SPLITS}
