"""The published sets, from files in their real formats on a loopback server."""

import io
import json
import pickle
import zipfile
from dataclasses import replace

import pytest

from data_pipeline import download
from data_pipeline.datasets import find_dataset
from data_pipeline.errors import DataError
from data_pipeline.info import RemoteFile, SplitRecipe, SplitSizes
from data_pipeline.prepare import prepare_dataset
from data_pipeline.sources.remote import DOWNLOADS, RemoteSource
from data_pipeline.table import StructureTable
from tests.data_pipeline.server import Site, serve


def atoms(i, cartesian=False):
    a = 4.0 + 0.01 * i
    coords = [[0, 0, 0], [a / 2, a / 2, a / 2]] if cartesian else [[0, 0, 0], [0.5, 0.5, 0.5]]
    return {
        "lattice_mat": [[a, 0, 0], [0, a, 0], [0, 0, a]],
        "coords": coords,
        "elements": ["Cs", " Cl"],
        "abc": [a, a, a],
        "angles": [90, 90, 90],
        "cartesian": cartesian,
        "props": ["", ""],
    }


def zipped(records, name="megnet.json"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, json.dumps(records))
    return stream.getvalue()


def megnet(n=30):
    return [
        {"id": f"mp-{i}", "gap pbe": 0.1 * i, "e_form": -1 if i == 3 else -1.5 + i, "atoms": atoms(i, i % 2 == 1)}
        for i in range(n)
    ]


def local(info, site, files, **changes):
    """The registered set, with its files on the local server and no published check values."""
    files = tuple(
        replace(file, url=f"{site.url}/{i}") if content is not None else file
        for i, (file, content) in enumerate(zip(info.files, files, strict=True))
    )
    return replace(info, **{"files": files, "expected": None, "ends": (), "recipe": SplitRecipe(), **changes})


def test_jarvis_zip(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(download.time, "sleep", pauses.append)
    records = megnet()
    records[4]["gap pbe"] = "na"
    records[5]["e_form"] = None
    records[6]["e_form"] = float("inf")
    records[7]["atoms"]["elements"] = ["Cs", "Qq"]
    records[8]["atoms"]["coords"] = [[0, 0, 0], [0, 0]]
    del records[9]["atoms"]
    records[10]["atoms"]["coords"][1] = [0.01, 0, 0]
    with serve(Site({"/0": zipped(records)}, break_after=[100])) as site:
        info = local(find_dataset("jarvis__megnet"), site, [b""])
        done = prepare_dataset(info, tmp_path)
        assert [wanted for _, wanted in site.seen] == [None, "bytes=100-"]
        assert prepare_dataset(info, tmp_path).reused and len(site.seen) == 2
    assert pauses == [1.0]
    assert {row.row: row.reason.split(":")[0] for row in done.rejected} == {
        6: "bad target",
        7: "unknown element",
        8: "unreadable structure",
        9: "empty structure",
        10: "overlapping atoms",
    }
    raw = json.loads((done.path / "dataset.json").read_text())["rows"]
    assert raw["outside_the_set"] == {"missing target: bandgap": 1, "missing target: e_form": 1}
    assert raw["read"] == 30 and raw["usable"] == 24
    table = StructureTable.open(done.split_path("train"), ["e_form", "bandgap"])
    row = table.material_ids().index("mp-3")
    packed = table.gather(table.sizes[:0] if row is None else [row])
    assert packed.atomic_numbers.tolist() == [55, 17]
    assert packed.positions[1].tolist() == pytest.approx([2.015] * 3)
    assert table.targets([row])[0].tolist() == pytest.approx([-1.0, 0.3])


def test_published_sizes_and_ends_are_checked(tmp_path):
    with serve(Site({"/0": zipped(megnet(30))})) as site:
        plain = find_dataset("megnet")
        short = local(plain, site, [b""], expected=SplitSizes(train=60000, val=5000, test=4239))
        with pytest.raises(DataError, match="the source holds other rows than the published ones"):
            prepare_dataset(short, tmp_path)
        with pytest.raises(DataError, match="the splits begin and end with"):
            prepare_dataset(local(plain, site, [b""], ends=plain.ends), tmp_path)
        assert not (tmp_path / "jarvis__megnet").exists()


def test_damaged_archive_and_no_network(tmp_path):
    with serve(Site({"/0": zipped(megnet())[:-40]})) as site:
        info = local(find_dataset("jarvis__megnet"), site, [b""])
        with pytest.raises(DataError, match="megnet.json.zip: cannot be read"):
            prepare_dataset(info, tmp_path)
    (tmp_path / ".downloads" / "megnet.json.zip").unlink()
    info = replace(info, files=(RemoteFile(url="http://127.0.0.1:9/x", name="x.zip"),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(DataError, match="use an embedded data set .elastic_tensor_2015"):
            prepare_dataset(info, tmp_path)


def elastic_files():
    made = []
    for start, n in ((0, 8), (8, 2), (10, 3)):
        made.append(
            pickle.dumps(
                [{"id": f"mp-{i}", "atoms": atoms(i), "shear modulus": 1.5 + i} for i in range(start, start + n)]
            )
        )
    return made


def test_matformer_pickles_keep_their_splits(tmp_path):
    contents = elastic_files()
    with serve(Site({f"/{i}": content for i, content in enumerate(contents)})) as site:
        info = local(find_dataset("megnet-shear"), site, contents)
        with pytest.raises(DataError, match="--allow-pickle"):
            prepare_dataset(info, tmp_path)
        assert site.seen == []
        done = prepare_dataset(info, tmp_path, allow_pickle=True)
        assert prepare_dataset(info, tmp_path).reused
    assert (done.sizes.train, done.sizes.val, done.sizes.test) == (8, 2, 3)
    table = StructureTable.open(done.split_path("val"), ["shear"])
    assert table.material_ids() == ["mp-8", "mp-9"] and table.targets()[:, 0].tolist() == [9.5, 10.5]


def test_malicious_figshare_pickle(tmp_path):
    marker = tmp_path / "it-ran"
    evil = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
    contents = [evil, *elastic_files()[1:]]
    with serve(Site({f"/{i}": content for i, content in enumerate(contents)})) as site:
        with pytest.raises(DataError, match="it asks for os.system"):
            prepare_dataset(local(find_dataset("megnet-shear"), site, contents), tmp_path, allow_pickle=True)
    assert not marker.exists()


@pytest.mark.parametrize("what", ["damaged", "deep", "encrypted"])
def test_an_archive_that_cannot_be_unpacked_is_one_line(what, tmp_path):
    content = bytearray(zipped(megnet()))
    if what == "deep":
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("x.json", "[" * 100_000)
        content = bytearray(stream.getvalue())
    elif what == "damaged":
        content[60:120] = b"\xff" * 60
    else:
        content[6] |= 1
        content[content.index(b"PK\x01\x02") + 8] |= 1
    info = find_dataset("jarvis__megnet")
    (tmp_path / DOWNLOADS).mkdir()
    (tmp_path / DOWNLOADS / info.files[0].name).write_bytes(content)
    source = RemoteSource(info, tmp_path, lambda *_: None, allow_pickle=False)
    with pytest.raises(DataError, match="cannot be read: .*delete it to download it again"):
        list(source.tables())
