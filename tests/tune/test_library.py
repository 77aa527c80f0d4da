"""The data that trials share: cut lists are the lists that a run would find, and few radii are found."""

import numpy as np
import pytest

from cluster.tables import open_split
from data_pipeline.prepared import load_prepared
from tune.library import STEP, grid_radius, within


@pytest.fixture(scope="module")
def salts(data_dir):
    return load_prepared(data_dir, "salts")


def shells(dataset, radius):
    return open_split(dataset, "train", ["gap"], radius).shells


@pytest.mark.parametrize("radius", [3.0, 6.3, 8.9, 9.0])
def test_lists_cut_to_a_radius_are_those_found_within_it(salts, radius):
    cut = within(shells(salts, 9.0), radius)
    found = shells(salts, radius)
    assert cut.schema.equals(found.schema)
    for name in found.column_names:
        assert cut.column(name).to_pylist() == found.column(name).to_pylist()
    assert sum(map(len, cut.column("distance").to_pylist())) > 100


def test_rows_from_the_middle_of_a_table_are_cut_too(salts):
    some = shells(salts, 9.0).slice(5, 7)
    assert within(some, 6.3).equals(within(shells(salts, 9.0), 6.3).slice(5, 7).combine_chunks())


def test_few_radii_serve_many():
    wanted = np.geomspace(3, 40, 200)
    found = {grid_radius(float(radius), 11.88) for radius in wanted}
    assert len(found) == 13
    assert 11.88 in found
    for radius in wanted:
        assert radius <= grid_radius(float(radius), 11.88) <= radius * STEP * (1 + 1e-9)
    assert grid_radius(0.0, 11.88) == 0.0
