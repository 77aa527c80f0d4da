"""Compressed files are read as what is in them; damaged ones and bombs are told in one line."""

import bz2
import gzip
import lzma

import pytest

from data_pipeline.errors import DataError
from data_pipeline.formats import json_stream
from data_pipeline.formats.compressed import inner_name, is_compressed, open_bytes, read_bytes, read_text
from data_pipeline.own import OwnData, prepare_source
from data_pipeline.sources import records
from data_pipeline.sources.records import iter_fields
from tests.cluster.trained import structures

PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("ending", PACK)
def test_content_and_name(ending, tmp_path):
    path = tmp_path / f"CONTCAR.Relax2{ending}"
    path.write_bytes(PACK[ending]("\ufeffone\r\ntwo\n".encode()))
    assert read_text(path) == "one\ntwo\n"
    assert inner_name(path) == "contcar.relax2" and is_compressed(path) == bool(ending)
    with open_bytes(path) as stream:
        assert stream.read(3) == b"\xef\xbb\xbf"


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_damage_and_size(ending, tmp_path):
    path = tmp_path / f"x.cif{ending}"
    packed = bytearray(PACK[ending](bytes(range(256)) * 4000))
    path.write_bytes(packed)
    with pytest.raises(ValueError, match="unreadable file: more than 1000 bytes, decompressed"):
        read_bytes(path, limit=1000)
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="unreadable file: cannot be decompressed: "):
        read_bytes(path)
    path.write_bytes(b"plain text")
    with pytest.raises((ValueError, OSError)):
        read_bytes(path)


def test_records_in_damaged_and_deep_files(tmp_path):
    damaged = bytearray(gzip.compress(b'[{"id": "a"}, {"id": "b"}]' * 100))
    damaged[10:40] = b"\xff" * 30  # no kind of deflated block begins so
    (tmp_path / "a.json.gz").write_bytes(damaged)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.JSONL.xz").write_bytes(lzma.compress(b'\xef\xbb\xbf{"id": 1}\n' + b"[" * 100_000 + b"\n"))
    with pytest.raises(DataError, match=r"a\.json\.gz: cannot be read: Error -3"):
        list(iter_fields(tmp_path / "a.json.gz"))
    with pytest.raises(DataError, match=r"deep\.json: cannot be read: JSON within JSON, too deep"):
        list(iter_fields(tmp_path / "deep.json"))
    assert list(iter_fields(tmp_path / "deep.JSONL.xz")) == [
        {"id": 1},
        "unreadable record: JSON within JSON, too deep to be a structure",
    ]


def test_prepare_takes_compressed_files_and_refuses_several_structures(tmp_path):
    folder = tmp_path / "cifs"
    folder.mkdir()
    texts = [structure.to(fmt="cif") for structure in structures()]
    for i in range(8):
        (folder / f"s{i}.cif{['.gz', '.xz'][i % 2]}").write_bytes(PACK[[".gz", ".xz"][i % 2]](texts[i % 4].encode()))
    (folder / "two.cif").write_text(texts[0] + texts[2])
    names = [*(f"s{i}" for i in range(8)), "two"]
    (folder / "id_prop.csv").write_text("".join(f"{name},{i}\n" for i, name in enumerate(names)))
    done = prepare_source(OwnData(path=folder, name="mine", split=(0.5, 0.25, 0.25)), tmp_path / "data")
    (row,) = done.rejected
    assert row.reason.startswith("several structures: 2 data blocks hold atoms: ")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz", "x.csv.gz"])
def test_a_bomb_of_one_record_is_not_unpacked_whole(name, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LINE_LIMIT", 100_000)
    monkeypatch.setattr(json_stream, "LIMIT", 100_000)
    monkeypatch.setattr(json_stream, "CHUNK", 10_000)
    zeros = "0" * 10_000_000
    content = {
        "x.jsonl.gz": f'{{"id": "a"}}\n{{"id": "{zeros}',
        "x.json.gz": f'[{{"id": "a"}}, {{"id": "{zeros}',
        "x.csv.gz": f"id\na\n{zeros}",
    }[name]
    path = tmp_path / name
    path.write_bytes(gzip.compress(content.encode()))
    found = iter_fields(path)
    assert next(found) == {"id": "a"}
    with pytest.raises(
        DataError, match=r"cannot be read: it holds a (line|JSON value) of more than 100000 characters"
    ):
        list(found)
