"""Columns of a structure table from crystals and back."""

import numpy as np
import pyarrow as pa

from data_pipeline.crystal import EMPTY, fixed_values, read_crystals, structure_columns
from data_pipeline.schema import STRUCTURE_COLUMNS
from data_pipeline.validate import structure_problem
from tests.data_pipeline.samples import caesium_chloride, crystal, mixed_rock_salt, rock_salt

NAMES = [name for name, _ in STRUCTURE_COLUMNS]


def same(a, b):
    assert np.array_equal(a.positions, b.positions)
    assert np.array_equal(a.atomic_numbers, b.atomic_numbers)
    assert np.array_equal(a.lattice, b.lattice)
    assert (a.disorder is None) == (b.disorder is None)
    if a.disorder is not None:
        assert np.array_equal(a.disorder.site, b.disorder.site)
        assert np.array_equal(a.disorder.atomic_number, b.disorder.atomic_number)
        assert np.array_equal(a.disorder.occupancy, b.disorder.occupancy)


def test_round_trip_bit_for_bit():
    crystals = [rock_salt(), EMPTY, mixed_rock_salt(), caesium_chloride()]
    table = pa.Table.from_arrays(structure_columns(crystals), names=NAMES)
    for kind, (_, wanted) in zip(table.schema.types, STRUCTURE_COLUMNS, strict=True):
        assert kind == wanted
    for a, b in zip(crystals, read_crystals(table), strict=True):
        same(a, b)


def test_slices_and_chunks():
    crystals = [rock_salt(5 + 0.1 * i) if i % 2 else mixed_rock_salt(5 + 0.1 * i) for i in range(6)]
    table = pa.Table.from_arrays(structure_columns(crystals), names=NAMES)
    parts = pa.concat_tables([table.slice(1, 2), table.slice(4, 2)])
    for i, found in zip([1, 2, 4, 5], read_crystals(parts), strict=True):
        same(crystals[i], found)
    same(crystals[3], read_crystals(table.slice(3, 1))[0])


def test_absurd_atomic_number_does_not_become_an_element():
    table = pa.Table.from_arrays(structure_columns([crystal(np.eye(3), [[0, 0, 0]], [65537])]), names=NAMES)
    assert read_crystals(table)[0].atomic_numbers.tolist() == [32767]


def test_null_lattice_reads_as_nan():
    column = pa.array([[1.0] * 9, None, [2.0] * 9], type=pa.list_(pa.float64(), 9)).slice(1)
    values = fixed_values(column, 9).reshape(-1, 9)
    assert np.isnan(values[0]).all() and (values[1] == 2).all()


def test_nulls_in_a_row_are_values_that_no_crystal_has():
    table = pa.Table.from_arrays(structure_columns([mixed_rock_salt()] * 4), names=NAMES)
    rows = table.to_pylist()
    rows[0]["disorder"][0] = None
    rows[1]["disorder"][0] = {"site": None, "atomic_number": None, "occupancy": None}
    rows[2]["atomic_numbers"][0] = None
    rows[3]["positions"][0] = None
    found = read_crystals(pa.Table.from_pylist(rows, schema=table.schema))
    for mixed in (found[0].disorder, found[1].disorder):
        assert mixed.site[0] == mixed.atomic_number[0] == -1 and np.isnan(mixed.occupancy[0])
    assert found[2].atomic_numbers[0] == -1 and np.isnan(found[3].positions).any()
    assert all(structure_problem(one) is not None for one in found)
