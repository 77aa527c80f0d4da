"""A data set as text and as a picture."""

from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.describe import describe, histogram, plot
from data_pipeline.errors import DataError
from data_pipeline.prepare import prepare_dataset, prepare_from
from tests.data_pipeline.samples import caesium_chloride
from tests.data_pipeline.test_prepare import INFO, ListSource, records


def test_text_of_an_embedded_set(tmp_path):
    prepare_dataset("dielectric_2017", tmp_path)
    text = describe(tmp_path, "dielectric_2017")
    assert text.startswith("dielectric_2017: 844 train, 105 val, 105 test\n")
    for part in ("Sci. Data 4, 160134", "CC BY 4.0", "bandgap [eV]: training mean 2.149", "no row was rejected"):
        assert part in text
    assert "\nn: training mean" in text  # a pure number has no unit to be shown
    assert text.endswith("2 usable rows are in no split, left over by its sizes or ratios")
    assert "63 elements" in text and "\n  O 217  " in text


def test_rejected_rows_and_disordered_elements(tmp_path):
    bad = [replace(r, crystal=caesium_chloride(z=100 + i)) if i < 12 else r for i, r in enumerate(records(40))]
    prepare_from(ListSource(bad), INFO, tmp_path)
    text = describe(tmp_path, "mine")
    assert "12 rows rejected: 12 unknown element" in text
    assert "  f.csv row 9 m9: unknown element: atomic number 109 is not" in text and "row 10" not in text
    assert "all of them in" in text and "K 9" in text


def test_histogram_counts_every_value():
    lines = histogram(np.arange(100.0))
    assert sum(int(line.split()[-1]) for line in lines) == 100 and len(lines) == 12
    assert histogram(np.full(3, 2.0))[6].endswith(" 3")
    assert histogram(np.zeros(0)) == ["  no values"]


def test_picture(tmp_path):
    prepare_dataset("dielectric_2017", tmp_path)
    out = plot(tmp_path, "dielectric_2017", tmp_path / "d.png")
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000


def test_what_is_not_prepared_is_said(tmp_path):
    with pytest.raises(DataError, match="'mine' is not prepared"):
        describe(tmp_path, "mine")
