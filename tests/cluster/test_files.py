"""Whole files or none."""

import os

import pytest

from cluster.files import dump_yaml, read_yaml, write_text


def test_write_text_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one")
    write_text(path, "twö\n")
    assert path.read_bytes() == "twö\n".encode()
    assert os.listdir(path.parent) == ["b.txt"]


def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_yaml_there_and_back(tmp_path):
    values = {"b": [1, 2.5], "a": "no", "c": None, "d": True, "e": "2026-01-01", "f": "x: y"}
    path = tmp_path / "a.yaml"
    write_text(path, dump_yaml(values))
    assert read_yaml(path) == values
    assert path.read_text(encoding="utf-8").splitlines()[0] == "b: [1, 2.5]"
    write_text(path, "# nothing\n")
    assert read_yaml(path) == {}
