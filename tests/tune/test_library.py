"""The data that trials share: cut lists are the lists that a run would find, and few radii are found."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cluster.data.tables import open_split
from crystalformer.config import Neighborhood
from data_pipeline.prepared import load_prepared
from tune.library import STEP, Tables, grid_radius, within

LIMIT_MB = 0
"""Every split is above it, so that tables stay on disk and no Ray is needed."""


@pytest.fixture(scope="module")
def salts(data_dir):
    return load_prepared(data_dir, "salts")


def shells(dataset, radius):
    return open_split(dataset, "train", ["gap"], Neighborhood(radius)).shells


@pytest.fixture
def unsearched(salts, tmp_path):
    """The data set in a folder without neighbour lists."""
    folder = tmp_path / salts.name
    shutil.copytree(salts.path, folder, ignore=shutil.ignore_patterns("*.arrow"))
    return load_prepared(tmp_path, salts.name)


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


def test_a_request_that_finds_lists_is_counted_once_however_many_wait(unsearched):
    library = Tables(unsearched, ("gap",), 6.0, LIMIT_MB)
    with ThreadPoolExecutor(4) as trials:
        data = list(trials.map(lambda radius: library.data(Neighborhood(radius), "scale_bias"), [5.9, 6.0, 4.7, 4.8]))
    assert {round(one.radius, 9) for one in data} == {6.0, 4.8}
    assert library.counts() == (4, 2)
    again = Tables(unsearched, ("gap",), 6.0, LIMIT_MB)
    again.data(Neighborhood(6.0), "scale_bias")
    assert again.counts() == (1, 0)


def test_lists_of_a_read_only_data_set_are_counted_too(unsearched, tmp_path, monkeypatch):
    """They are kept in another folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("os.access", lambda *_args, **_more: False)
    library = Tables(unsearched, ("gap",), 6.0, LIMIT_MB)
    library.data(Neighborhood(6.0), "scale_bias")
    assert library.counts() == (1, 1)
    assert list((tmp_path / "cache").rglob("*-6.0000.arrow"))
