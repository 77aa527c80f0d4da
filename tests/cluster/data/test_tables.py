"""Where the Arrow files of a split are kept."""

import logging
import os
from dataclasses import replace

from cluster.data.tables import open_split
from data_pipeline.prepare import prepare_dataset

RADIUS = 4.0


def test_read_only_data_are_mapped_from_the_users_cache(tmp_path, monkeypatch, caplog):
    """Told by os.access alone, since a test may run as root, whom no mode keeps out."""
    prepared = prepare_dataset("dielectric_2017", tmp_path / "data")
    expected = open_split(prepared, "val", ("n",), RADIUS)
    locked = replace(prepared, path=(tmp_path / "data").rename(tmp_path / "locked") / prepared.name)
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    before = sorted(locked.path.rglob("*"))
    with caplog.at_level(logging.INFO, "cluster.data.tables"):
        monkeypatch.setattr(logging.getLogger("cluster"), "propagate", True)
        beside, made = (open_split(locked, split, ("n",), RADIUS) for split in ("val", "test"))
    assert beside.structures.equals(expected.structures) and beside.shells.equals(expected.shells)
    assert beside.files[1].parent == locked.path / "shells", "what lies there is used"
    cache = tmp_path / "caches" / "crystalformer" / prepared.fingerprint[:16]
    assert [file.parent for file in made.files] == [cache / "shells"] * 2 and all(f.is_file() for f in made.files)
    assert len(made.shells) == 105 and sorted(locked.path.rglob("*")) == before
    (said,) = [record.getMessage() for record in caplog.records if record.name == "cluster.data.tables"]
    assert said == f"{locked.path} is read-only: structures and neighbour lists are mapped from {cache}"
