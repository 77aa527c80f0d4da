"""dataset.json and what is said when it is not one."""

import json

import pytest

from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare_from
from data_pipeline.prepared import is_prepared, load_prepared
from tests.data_pipeline.samples import caesium_chloride
from tests.data_pipeline.test_prepare import INFO, ListSource, records


def test_all_that_was_written_is_read(tmp_path):
    bad = records(20, r4={"crystal": caesium_chloride(z=120)})
    assert not is_prepared(tmp_path, "mine")
    prepare_from(ListSource(bad), INFO, tmp_path)
    found = load_prepared(tmp_path, "mine")
    assert is_prepared(tmp_path, "mine") and found.path == tmp_path / "mine"
    assert found.sizes.train + found.sizes.val + found.sizes.test == 19 and found.target_names == ("hardness",)
    assert found.split_path("val") == tmp_path / "mine" / "val" and found.rejected[0].material_id == "m4"
    assert found.elements == ("Na", "Cl", "K", "Cs") and found.statistics["hardness"].std > 1


def test_what_is_no_description(tmp_path):
    with pytest.raises(DataError, match="'mine' is not prepared under"):
        load_prepared(tmp_path, "mine")
    prepare_from(ListSource(records(20)), INFO, tmp_path)
    file = tmp_path / "mine" / "dataset.json"
    whole = json.loads(file.read_text())
    lacking = json.dumps({**whole, "sizes": {"train": 1}}).encode()
    for content in (b"", b"[]", b"{}", lacking, b"\xff\xfe{}", b"[" * 100_000, b"9" * 5000):
        file.write_bytes(content)
        with pytest.raises(
            DataError, match=r"dataset.json: not a data set description .*; prepare the data set again"
        ):
            load_prepared(tmp_path, "mine")
