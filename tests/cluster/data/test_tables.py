"""Where the Arrow files of a split are kept."""

import os
from dataclasses import replace

from cluster.data.tables import open_split
from cluster.log import setup_logging
from data_pipeline.prepare import prepare_dataset

RADIUS = 4.0


def test_read_only_data_are_mapped_from_the_users_cache(tmp_path, monkeypatch, capsys):
    """Told by os.access alone, since a test may run as root, whom no mode keeps out."""
    prepared = prepare_dataset("dielectric_2017", tmp_path / "data")
    expected = open_split(prepared, "val", ("n",), RADIUS)
    locked = replace(prepared, path=(tmp_path / "data").rename(tmp_path / "locked") / prepared.name)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    before = sorted(locked.path.rglob("*"))
    setup_logging()
    beside, made = (open_split(locked, split, ("n",), RADIUS) for split in ("val", "test"))
    assert beside.structures.equals(expected.structures) and beside.shells.equals(expected.shells)
    assert beside.files[1].parent == locked.path / "shells", "what lies there is used"
    cache = tmp_path / "caches" / "crystalformer" / prepared.fingerprint[:16]
    assert [file.parent for file in made.files] == [cache / "shells"] * 2 and all(f.is_file() for f in made.files)
    assert len(made.shells) == 105 and sorted(locked.path.rglob("*")) == before
    said = f"warning: {locked.path} is read-only: structures and neighbour lists are mapped from {cache}\n"
    assert capsys.readouterr().err == said
