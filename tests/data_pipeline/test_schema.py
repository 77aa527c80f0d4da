"""A structure table of another kind is refused with what is wrong."""

import pyarrow as pa
import pytest

from data_pipeline.errors import DataError
from data_pipeline.info import TargetInfo
from data_pipeline.schema import VERSION_KEY, check_columns, check_schema, structure_schema, target_fields

SHEAR = TargetInfo(name="shear", unit="log10(GPa)", description="shear modulus")


def test_own_schema_passes_and_declares_its_targets():
    schema = structure_schema([SHEAR], {"note": "x"})
    check_schema(schema, "here")
    assert schema.metadata[b"note"] == b"x"
    assert target_fields(schema) == (SHEAR,)


def test_names_of_list_items_do_not_matter():
    schema = structure_schema([])
    renamed = pa.list_(pa.field("element", pa.list_(pa.field("element", pa.float64()), 3)))
    index = schema.get_field_index("positions")
    check_schema(schema.set(index, pa.field("positions", renamed)), "here")


def test_another_version_and_no_version_are_told_apart():
    schema = structure_schema([])
    with pytest.raises(DataError, match="a.parquet: structure table of schema version 7.*reads version 1"):
        check_schema(schema.with_metadata({VERSION_KEY: b"7"}), "a.parquet")
    with pytest.raises(DataError, match="lacks crystalformer.schema_version"):
        check_schema(schema.remove_metadata(), "a.parquet")


def test_missing_column_and_wrong_type_are_named():
    schema = structure_schema([SHEAR])
    with pytest.raises(DataError, match="column 'lattice' is missing"):
        check_schema(schema.remove(schema.get_field_index("lattice")), "a")
    with pytest.raises(DataError, match="column 'bulk' is missing"):
        check_columns(schema, "a", ["bulk"])
    index = schema.get_field_index("positions")
    wrong = schema.set(index, pa.field("positions", pa.list_(pa.float64())))
    with pytest.raises(DataError, match=r"column 'positions' has type list<item: double>, not"):
        check_schema(wrong, "a")
