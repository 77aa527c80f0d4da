"""Put a finished data set where it belongs: in a folder of its own, or beside the pickles it was made of.

The authors' programs keep data/<name>/{train,val,test}/raw/raw_data.pkl. Of such a folder only dataset.json,
{train,val,test}/part-*.parquet and what training keeps in shells/ are ours; nothing else in it is moved, replaced or
deleted.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.authors_layout import raw_pickles
from data_pipeline.errors import DataError
from data_pipeline.prepared import FILE_NAME
from data_pipeline.splits import SPLITS

NAME_KEY = "crystalformer.dataset"
"""In the metadata of every Parquet file of a prepared data set: its name when it was made."""
_OURS = re.compile(r"part-\d{5,}\.parquet|\.part-\d{5,}\.parquet\.partial")
"""Names of the files we write into the folder of a split."""
_SHELLS = "shells"
"""Folder of what training finds of the crystals and can find again; its files name the data they were made from."""
_OF_SPLIT = rf"({'|'.join(SPLITS)})-(structures|\d+\.\d+)\.arrow"
_OURS_IN_SHELLS = re.compile(rf"{_OF_SPLIT}|\.{_OF_SPLIT}\..+")
"""Names in there; those that begin with a dot are folders of files in the making."""
_REPLACING = f".{FILE_NAME}.replacing"
"""Lies in a folder while our files are put beside somebody else's: where that was stopped, it is ours still."""
_OUR_FILES = (FILE_NAME, f".{FILE_NAME}.partial", _REPLACING)
_OUR_FOLDERS = {**dict.fromkeys(SPLITS, _OURS), _SHELLS: _OURS_IN_SHELLS}


def check_target(target: Path) -> None:
    """Raises DataError where a data set cannot be put at ``target`` without losing what somebody else has there."""
    if not target.exists():
        return
    prepared = any((target / name).is_file() for name in (FILE_NAME, _REPLACING))
    if not prepared and any(target.iterdir()) and not raw_pickles(target):
        raise DataError(f"{target}: exists and is not a prepared data set; choose another name or folder")
    for file in (file for split in SPLITS for file in (target / split).glob("*.parquet")):
        if not (_OURS.fullmatch(file.name) and (prepared or _says_ours(file))):
            raise DataError(f"{file}: is not of a prepared data set, but would be read as a part of it; take it away")


def publish(made: Path, target: Path) -> None:
    """Put the finished data set ``made`` at ``target``, for which check_target has nothing to say.

    What we did not write stays there, and a link stays one: its folder may be on a disk that has the room. A process
    that is killed on the way leaves either the old one, or none that counts as prepared.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.is_symlink() or _holds_more(target):
        _put_beside(made, target)
        return
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _says_ours(file: Path) -> bool:
    """Whether a Parquet file says that it is one of ours, as one left by a process that was killed."""
    try:
        return NAME_KEY.encode() in (pq.read_schema(file).metadata or {})
    except (pa.ArrowInvalid, OSError):
        return False


def _holds_more(target: Path) -> bool:
    """Whether the folder holds what we did not write: beside dataset.json, or in a folder of ours, such as raw/."""
    return target.is_dir() and not all(_is_ours(path) for path in target.iterdir())


def _is_ours(path: Path) -> bool:
    """Whether we wrote that file of a data set's folder, or that folder of it with everything in it."""
    if path.is_symlink():
        return False
    if path.name in _OUR_FILES:
        return path.is_file()
    ours = _OUR_FOLDERS.get(path.name)
    return ours is not None and path.is_dir() and all(ours.fullmatch(inner.name) for inner in path.iterdir())


def _put_beside(made: Path, target: Path) -> None:
    """Replace our files one by one; the description comes last, and without it the folder is not a prepared one."""
    (target / _REPLACING).touch()
    (target / FILE_NAME).unlink(missing_ok=True)
    for left in (target / _SHELLS).glob("*.arrow"):  # of the old data
        if _OURS_IN_SHELLS.fullmatch(left.name):
            left.unlink()
    for split in SPLITS:
        folder = target / split
        folder.mkdir(exist_ok=True)
        for left in [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]:
            left.unlink()
        for part in sorted((made / split).iterdir()):
            _move(part, folder / part.name)
    _move(made / FILE_NAME, target / FILE_NAME)
    (target / _REPLACING).unlink()


def _move(file: Path, to: Path) -> None:
    """Under another name until it is whole: the folder may be a link to another disk, where moving is copying."""
    partial = to.with_name(f".{to.name}.partial")
    shutil.move(file, partial)
    partial.replace(to)
