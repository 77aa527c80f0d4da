"""Files that may be compressed: .gz, .bz2 and .xz, judged by the name within."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from pathlib import Path
from typing import BinaryIO, cast

ENDINGS = (".gz", ".bz2", ".xz")
LIMIT = 1 << 30
"""Bytes of a structure file once it is decompressed: a small file may hold any number of zeros."""
DAMAGED = (zlib.error, lzma.LZMAError, EOFError)
"""What reading a damaged compressed file raises besides OSError."""

_PIECE = 1 << 20


def inner_name(path: Path) -> str:
    """The name, in lower case, of what is in a file: without the ending of a compressed one."""
    name = path.name.lower()
    return name[: -len(_ending(name))] if _ending(name) else name


def is_compressed(path: Path) -> bool:
    """Whether the file's name says that it is."""
    return bool(_ending(path.name.lower()))


def open_bytes(path: Path) -> BinaryIO:
    """The content, decompressed while it is read. Raises OSError; reading raises OSError or one of DAMAGED."""
    ending = _ending(path.name.lower())
    if ending == ".gz":
        return cast("BinaryIO", gzip.open(path))
    if ending == ".bz2":
        return cast("BinaryIO", bz2.open(path))
    return cast("BinaryIO", lzma.open(path)) if ending else path.open("rb")


def read_bytes(path: Path, limit: int = LIMIT) -> bytes:
    """The whole content. Raises OSError, and ValueError for a damaged file or one of more than ``limit`` bytes."""
    content = bytearray()
    with open_bytes(path) as stream:
        try:
            while piece := stream.read(_PIECE):
                content += piece
                if len(content) > limit:
                    raise ValueError(f"unreadable file: more than {limit} bytes, decompressed")
        except DAMAGED as error:
            raise ValueError(f"unreadable file: cannot be decompressed: {error}") from error
    return bytes(content)


def read_text(path: Path, limit: int = LIMIT) -> str:
    """The whole content as text, without a byte order mark, lines ending as in Unix. Raises as read_bytes."""
    text = read_bytes(path, limit).decode("utf-8-sig", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _ending(name: str) -> str:
    return next((ending for ending in ENDINGS if name.endswith(ending)), "")
