"""Records out of JSON, piece by piece."""

import io
import json

import pytest

from data_pipeline import json_stream
from data_pipeline.json_stream import iter_records

RECORDS = [{"id": f"é{i}", "x": [i, {"deep": "]}, {"}], "y": 1.5e-3} for i in range(40)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("form", ["array", "indented", "lines", "byte order mark"])
def test_any_layout_any_piece_size(chunk, form, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    text = {
        "array": json.dumps(RECORDS),
        "indented": " \n" + json.dumps(RECORDS, indent=2) + "\n",
        "lines": "\n".join(map(json.dumps, RECORDS)) + "\n",
        "byte order mark": "\ufeff" + json.dumps(RECORDS),
    }[form]
    assert list(iter_records(io.StringIO(text))) == RECORDS


def test_an_object_of_records_and_a_single_record():
    by_id = {"a": {"atoms": 1}, "b": {"atoms": 2, "material_id": "own"}}
    found = list(iter_records(io.StringIO(json.dumps(by_id))))
    assert found == [{"material_id": "a", "atoms": 1}, {"atoms": 2, "material_id": "own"}]
    single = {"structure": {"sites": []}, "e": {}}
    assert list(iter_records(io.StringIO(json.dumps(single)))) == [single]


def test_memory_is_that_of_a_record_not_of_the_file():
    class Counting(io.StringIO):
        taken = 0

        def read(self, size=-1):
            Counting.taken += 1
            return super().read(size)

    stream = Counting(json.dumps([{"x": "a" * 100_000}] * 100))
    next(iter_records(stream))
    assert Counting.taken <= 2


def test_a_record_that_is_no_object_does_not_end_the_others():
    problem = "unreadable record: int, not an object"
    assert list(iter_records(io.StringIO('[{"a": 1}, 5, {"a": 2}]'))) == [{"a": 1}, problem, {"a": 2}]
    assert list(iter_records(io.StringIO('{"a": 1}\n5\n'))) == [{"a": 1}, problem]


@pytest.mark.parametrize("bad", ['{"x": nul, "y": 1}', '{"x" 1, "y": 1}', '{"x": "a\nb"}', "{'x': 1}"])
def test_a_mistake_is_told_without_reading_on(bad, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK", 1000)
    stream = io.StringIO('[{"a": 1}, ' + bad + ', {"a": "' + "a" * 100_000 + '"}]')
    with pytest.raises(ValueError, match="Expecting|Invalid"):
        list(iter_records(stream))
    assert stream.tell() <= 2000


@pytest.mark.parametrize("text", ["", "   ", "nonsense", '[{"a": 1}, ', '[{"a": 1}, {"b', "[{]", '"text"'])
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match="JSON|record|Expecting|Unterminated|property name"):
        list(iter_records(io.StringIO(text)))
