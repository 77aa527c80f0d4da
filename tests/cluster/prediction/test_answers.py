"""Files of predictions where two commands write one, and the claim on an output."""

import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.errors import UserError
from cluster.prediction import answers, inputs
from cluster.prediction.answers import TableFile, claimed
from tests.cluster.trained import write_model

HEADER = ["id", "formula", "y", "warning"]


def rows_of(name, count):
    return [[f"{name}{i}", "X", float(i), ""] for i in range(count)]


def ids_in(path):
    if path.suffix == ".parquet":
        return pq.read_table(path).column("id").to_pylist()
    return [line.split(",")[0] for line in path.read_text().splitlines()[1:]]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_two_that_write_one_file_write_it_whole(suffix, tmp_path):
    out = tmp_path / f"out{suffix}"
    with TableFile(out, HEADER) as second:
        with TableFile(out, HEADER) as first:
            first.add(rows_of("a", 3000))
            second.add(rows_of("b", 100))
            first.add(rows_of("c", 1000))
        assert ids_in(out) == [row[0] for row in rows_of("a", 3000) + rows_of("c", 1000)]
    assert ids_in(out) == [row[0] for row in rows_of("b", 100)]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_has_its_name_once_it_is_on_the_disk_and_leaves_nothing_where_it_fails(suffix, tmp_path, monkeypatch):
    out, synced, fsync = tmp_path / f"out{suffix}", [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(out.exists()) or fsync(handle))
    with pytest.raises(KeyError), TableFile(out, HEADER) as file:
        file.add(rows_of("a", 10))
        raise KeyError
    assert synced == [] and not list(tmp_path.iterdir())
    with TableFile(out, HEADER) as file:
        file.add(rows_of("a", 10))
    assert synced == [False] and list(tmp_path.iterdir()) == [out]


def test_a_header_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(answers.csv, "writer", full)
    with pytest.raises(UserError, match="disk full"), TableFile(tmp_path / "out.csv", HEADER):
        raise AssertionError
    assert not list(tmp_path.iterdir())


def test_a_claim_ends_with_what_it_is_for_and_tells_of_no_other_error(tmp_path):
    out = tmp_path / "out.csv"
    with pytest.raises(FileExistsError), claimed(out):
        assert [file.name for file in tmp_path.iterdir()] == [".out.csv.lock"]
        raise FileExistsError
    assert not list(tmp_path.iterdir())
    with claimed(out), pytest.raises(UserError, match="another command is writing .*out.csv"), claimed(out):
        raise AssertionError("the output was given to two")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="output .*out.csv: "), claimed(tmp_path / "file" / "out.csv"):
        raise AssertionError


HOLD = """
import sys
from pathlib import Path
from cluster.prediction.answers import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_resume_leaves_the_shards_of_a_command_at_work(elastic, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inputs, "STREAM_FROM", 10)
    out, shard = tmp_path / "out.csv", tmp_path / "out.csv.parts" / "00000000-0000000000-2-more.parquet"
    write_model(tmp_path / "model", seed=1)
    shard.parent.mkdir()
    shard.touch()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        command = ["predict", str(tmp_path / "model"), str(elastic.split_path("test")), "--output", str(out)]
        for words in (command, [*command, "--resume"]):
            assert main(words) == 2
            assert capsys.readouterr().err == f"error: another command is writing {out}\n"
        holder.stdin.close()
    assert [file.name for file in shard.parent.iterdir()] == [shard.name]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out.csv.parts"]
