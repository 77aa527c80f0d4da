"""The shipped tables, and the script that makes them."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.crystal import read_crystals
from data_pipeline.datasets import embedded_names, find_dataset
from data_pipeline.embedded_build import REJECTED_KEY, build_table, main, read_rows
from data_pipeline.errors import DataError
from data_pipeline.schema import check_schema, target_fields
from data_pipeline.sources.embedded import FOLDER
from data_pipeline.validate import structure_problem

SHIPPED = {
    "elastic_tensor_2015": (1181, "mp-10003", {"shear": np.log10(97.1416044794), "bulk": np.log10(194.268884359)}),
    "flla_2015": (3938, "mp-10", {"e_form": 0.1074050600000005, "ehull": 0.1074050600000005}),
    "dielectric_2017": (1056, "mp-441", {"bandgap": 1.88, "n": 1.86}),
}
POSCAR = "Na1 Cl1\n1.0\n4.0 0.0 0.0\n0.0 4.0 0.0\n0.0 0.0 {c}\nNa Cl\n1 1\ndirect\n0.0 0.0 0.0 Na\n0.5 0.5 {z} Cl\n"


def elastic_csv(rows):
    """In the published format: a comment, a header, and quoted POSCARs over several lines."""
    lines = ["# ref: somebody", "idx,G_VRH,K_VRH,material_id,nsites,poscar"]
    lines += [f'{i},{g},{k},{name},{n},"{poscar}"' for i, (g, k, name, n, poscar) in enumerate(rows)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", embedded_names())
def test_shipped_table(name):
    rows, first, values = SHIPPED[name]
    table = pq.read_table(FOLDER / f"{name}.parquet")
    check_schema(table.schema, name)
    info = find_dataset(name)
    assert [(t.name, t.unit, t.description) for t in target_fields(table.schema)] == [
        (t.name, t.unit, t.description) for t in info.targets
    ]
    assert len(table) == rows and len(set(table["material_id"].to_pylist())) == rows
    assert table["material_id"][0].as_py() == first
    for target, value in values.items():
        assert table[target][0].as_py() == pytest.approx(value, rel=1e-15)
        assert np.isfinite(table[target].to_numpy()).all()
    assert json.loads(table.schema.metadata[REJECTED_KEY.encode()]) == []
    assert table.schema.metadata[b"crystalformer.licence"].startswith(b"CC BY 4.0")
    assert all(structure_problem(c) is None for c in read_crystals(table.slice(0, 300)))


def test_shipped_sets_are_cited_with_their_counts():
    text = (FOLDER / "CITATIONS.md").read_text()
    for name, (rows, *_) in SHIPPED.items():
        assert f"| {name}.parquet | {rows} | 0 |" in text
    assert "CC BY 4.0" in text


def test_rows_are_kept_in_order_and_rejected_with_reasons():
    good = POSCAR.format(c="4.0", z="0.5")
    rows = [
        (100, 1000, "mp-1", 2, good),
        (-1, 10, "mp-2", 2, good),
        (1, "na", "mp-3", 2, good),
        (1, 1, "mp-4", 3, good),
        (1, 1, "mp-5", 2, "nonsense"),
        (1, 1, "mp-6", 2, POSCAR.format(c="0.0", z="0.5")),
        (1, 1, "mp-1", 2, good),
        (10, 1, "mp-7", 2, POSCAR.format(c="4.2", z="0.25")),
    ]
    table, rejected = build_table(find_dataset("elastic_tensor_2015"), elastic_csv(rows))
    assert table["material_id"].to_pylist() == ["mp-1", "mp-7"]
    assert table["shear"].to_pylist() == [2.0, 1.0] and table["bulk"].to_pylist() == [3.0, 0.0]
    assert read_crystals(table)[1].positions.tolist() == [[0, 0, 0], [2, 2, 1.05]]
    reasons = {row.row: row.reason for row in rejected}
    assert sorted(reasons) == [1, 2, 3, 4, 5, 6]
    assert "not above 0" in reasons[1] and "missing" in reasons[2] and "nsites is 3" in reasons[3]
    assert "unreadable poscar" in reasons[4] and "duplicate" in reasons[6]


def test_an_index_the_header_does_not_name_is_dropped():
    text = "# ref\nidx,band_gap,n\n0,7,1.88,1.86\n1,9,2.5,1.7\n"
    assert list(read_rows(text, "f"))[1] == {"idx": "9", "band_gap": "2.5", "n": "1.7"}
    with pytest.raises(DataError, match="row 0 has 5 fields, the header 3"):
        list(read_rows("# ref\na,b,c\n1,2,3,4,5\n", "f"))
    with pytest.raises(DataError, match="line 1 is not the comment"):
        list(read_rows("a,b,c\n", "f"))


def test_literal_structures():
    site = "{'abc': [0.5, 0, 0], 'species': [{'occu': %s, 'element': 'As'}]}"
    row = "mp-10,0.1,1,\"{'lattice': {'matrix': [[2, 0, 0], [0, 3, 0], [0, 0, 4]]}, 'sites': [" + site + ']}",0.2\n'
    text = "# ref\nmaterial_id,e_above_hull,nsites,structure,formation_energy_per_atom\n" + row % 1 + row % 0.5
    table, rejected = build_table(find_dataset("flla_2015"), text)
    assert read_crystals(table)[0].positions.tolist() == [[1, 0, 0]]
    assert table["e_form"].to_pylist() == [0.2] and table["ehull"].to_pylist() == [0.1]
    assert "duplicate" in rejected[0].reason


def test_another_archive_is_refused(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(b"something else")
    with pytest.raises(DataError, match="sha256 is .*, not 1a6bdfb1"):
        main([str(tmp_path / "x.tar.gz"), str(tmp_path / "out")])
    with pytest.raises(DataError, match="neither elastic_tensor.csv nor"):
        main([str(tmp_path), str(tmp_path / "out")])


@pytest.mark.skipif("MATMINER_SDIST" not in os.environ, reason="MATMINER_SDIST names matminer 0.4.0's sdist")
def test_rebuild_gives_the_shipped_bytes(tmp_path):
    assert main([os.environ["MATMINER_SDIST"], str(tmp_path)]) == 0
    for name in embedded_names():
        made, shipped = (Path(folder) / f"{name}.parquet" for folder in (tmp_path, FOLDER))
        assert hashlib.sha256(made.read_bytes()).digest() == hashlib.sha256(shipped.read_bytes()).digest()
