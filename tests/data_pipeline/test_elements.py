"""Symbols and atomic numbers."""

import pytest
from pymatgen.core.periodic_table import Element

from data_pipeline.elements import SYMBOLS, number_of, symbol_of


def test_same_as_pymatgen():
    assert len(SYMBOLS) == 118
    for number in range(1, 119):
        assert symbol_of(number) == Element.from_Z(number).symbol
        assert number_of(symbol_of(number)) == number
    assert number_of("D") == number_of("T") == 1


@pytest.mark.parametrize("symbol", ["", "Xx", "na", "Fe2+"])
def test_what_is_no_element(symbol):
    with pytest.raises(ValueError, match="unknown element"):
        number_of(symbol)
