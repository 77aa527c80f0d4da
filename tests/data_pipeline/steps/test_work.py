"""The work on a batch is a function of each row alone."""

import numpy as np
import pyarrow as pa

from data_pipeline.crystal import read_crystals
from data_pipeline.sources.raw import Record, raw_tables
from data_pipeline.steps.work import process_batch
from tests.data_pipeline.samples import HARDNESS, caesium_chloride, crystal, mixed_rock_salt, rock_salt

CIF = """data_NaCl
_symmetry_space_group_name_H-M 'P 1'
_cell_length_a 4.0
_cell_length_b 4.0
_cell_length_c 4.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
loop_
_atom_site_label
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
Cs1 0 0 0
Cl1 0.5 0.5 0.5
"""


def raw():
    parts = [
        {"crystal": rock_salt()},
        {"kind": "cif", "text": CIF},
        {"problem": "bad target: x"},
        {"crystal": mixed_rock_salt()},
        {"kind": "cif", "text": "data_"},
        {"crystal": crystal(np.eye(3) * 4, [[0, 0, 0], [0, 0, 0.0005]], [26, 26])},
        {"crystal": caesium_chloride()},
    ]
    records = [Record(file="f", row=i, material_id=f"m{i}", targets=(1.0,), **part) for i, part in enumerate(parts)]
    return next(iter(raw_tables(records, [HARDNESS])))


def test_rows_stay_in_place_with_their_problems():
    done = process_batch(raw())
    assert "kind" not in done.column_names and "text" not in done.column_names
    assert done["source_row"].to_pylist() == list(range(7))
    problems = done["problem"].to_pylist()
    assert [p and p.split(":")[0] for p in problems] == [
        None,
        None,
        "bad target",
        None,
        "unreadable structure",
        "overlapping atoms",
        None,
    ]
    assert [len(c.atomic_numbers) for c in read_crystals(done)] == [2, 2, 0, 2, 0, 0, 2]
    assert read_crystals(done)[1].atomic_numbers.tolist() == [55, 17]


def test_how_rows_are_batched_does_not_matter():
    whole = process_batch(raw())
    single = pa.concat_tables([process_batch(raw().slice(i, 1)) for i in range(7)])
    assert whole.equals(single.combine_chunks())
