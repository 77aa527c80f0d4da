"""Records out of JSON, piece by piece."""

import io
import json

import pytest

from data_pipeline.formats import json_stream
from data_pipeline.formats.json_stream import iter_records

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


@pytest.mark.parametrize("more", [{}, {"meta": {"count": 2}, "next": None, "fields": ["id", "y"], "errors": []}])
def test_an_object_with_one_list_of_records(more):
    whole = {**more, "data": [{"id": "a", "y": 1.0}, 5, {"id": "b", "y": 2.0}]}
    found = list(iter_records(io.StringIO(json.dumps(whole))))
    assert found == [{"id": "a", "y": 1.0}, "unreadable record: int, not an object", {"id": "b", "y": 2.0}]


@pytest.mark.parametrize(
    "whole",
    [
        {"structure": {"sites": []}, "history": [{"x": 1}]},
        {"lattice": {"a": 1}, "sites": [{"abc": [0, 0, 0]}]},
        {"CIF": "data_x", "authors": [{"name": "x"}]},
        {"data": [{"x": 1}], "included": [{"x": 2}]},
    ],
)
def test_lists_of_a_record_and_several_lists_are_not_taken_for_records(whole):
    assert list(iter_records(io.StringIO(json.dumps(whole)))) == [whole]


def test_tables_as_pandas_writes_them():
    found = [{"structure": {"sites": []}, "y": 1.0}, {"structure": {"sites": [2]}, "y": None}]
    split = {"index": [0, 1], "columns": ["structure", "y"], "data": [list(row.values()) for row in found]}
    assert list(iter_records(io.StringIO(json.dumps(split)))) == found
    split["data"].append([1])
    *_, problem = iter_records(io.StringIO(json.dumps(split)))
    assert problem == "unreadable record: a row of other fields than the 2 columns"
    columns = {name: {str(i): row[name] for i, row in enumerate(found)} for name in ("structure", "y")}
    assert list(iter_records(io.StringIO(json.dumps(columns)))) == found


def test_arrays_one_behind_the_other():
    text = json.dumps(RECORDS[:12]) + "\n" + json.dumps(RECORDS[12:])
    assert list(iter_records(io.StringIO(text))) == RECORDS
    found = iter_records(io.StringIO(json.dumps(RECORDS) + ' {"x": 1}'))
    assert [next(found) for _ in RECORDS] == RECORDS
    with pytest.raises(ValueError, match="there is text behind the JSON array, after record 39"):
        next(found)


@pytest.mark.parametrize("form", ["array", "lines"])
def test_bytes_that_are_no_text_cost_one_record(form):
    content = json.dumps(RECORDS) if form == "array" else "\n".join(map(json.dumps, RECORDS))
    broken = content.encode().replace(b"u00e97", b"u00e9\xe9")
    text = io.TextIOWrapper(io.BytesIO(broken), encoding="utf-8", errors="replace")
    found = list(iter_records(text))
    assert found[7].startswith("unreadable record: holds bytes that are not UTF-8")
    assert found[:7] + found[8:] == RECORDS[:7] + RECORDS[8:]


@pytest.mark.parametrize("content", [json.dumps(RECORDS).encode("utf-16"), b'{"a": {"x": "\xe9"}, "b": {"x": 1}}'])
def test_a_file_that_is_no_text(content):
    text = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="replace")
    with pytest.raises(ValueError, match="it holds bytes that are not UTF-8"):
        list(iter_records(text))


def test_an_object_of_records_is_decoded_in_linear_time(monkeypatch):
    """Counted, not timed: characters that the decoder is given, for a file of many pieces."""
    monkeypatch.setattr(json_stream, "CHUNK", 1000)
    given = []

    class Counting(json.JSONDecoder):
        def raw_decode(self, text, at=0):
            given.append(len(text) - at)
            return super().raw_decode(text, at)

    monkeypatch.setattr(json, "JSONDecoder", Counting)
    text = json.dumps({f"m{i}": {"x": "a" * 90} for i in range(2000)})
    assert len(list(iter_records(io.StringIO(text)))) == 2000
    assert sum(given) < 3 * len(text)


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
