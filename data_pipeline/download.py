"""Files over the network: resumed where a download broke off, checked, published under their name when whole."""

from __future__ import annotations

import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from data_pipeline.datasets import embedded_names
from data_pipeline.errors import DataError
from data_pipeline.info import RemoteFile
from data_pipeline.lock import locked

ATTEMPTS = 5
TIMEOUT_SECONDS = 30.0
_PIECE = 1 << 18
_BEGINNINGS = {".zip": b"PK", ".gz": b"\x1f\x8b"}
_RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

Progress = Callable[[str, int, int], None]


class _TryAgainError(Exception):
    """The connection failed in a way that may pass."""


def download(file: RemoteFile, folder: Path, progress: Progress, pause: float = 1.0) -> Path:
    """The path of ``file`` in ``folder``, downloaded unless it is there and whole.

    The SHA-256 of a complete file is kept beside it and checked whenever it is used again, and against the published
    one where there is one. A broken connection is taken up again at the byte where it broke, at most ATTEMPTS times
    with pauses of ``pause`` seconds and more. One process alone downloads a file, others wait for it. Raises
    DataError: unreachable, refused by the server, damaged, or a folder that cannot be written to.
    """
    path = folder / file.name
    if _is_whole(path, file.sha256):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}") from error
    with locked(path.with_name(f".{file.name}.lock")):
        if not _is_whole(path, file.sha256):
            _download(file, path, progress, pause)
    return path


def _is_whole(path: Path, published: str) -> bool:
    """Whether the file is there, which it is when whole. Raises DataError where it has changed since."""
    if not path.is_file():
        return False
    digest = _digest_file(path)
    _check(path, published or (digest.read_text().strip() if digest.is_file() else ""))
    return True


def _digest_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _download(file: RemoteFile, path: Path, progress: Progress, pause: float) -> None:
    part = _part(path)
    for attempt in range(ATTEMPTS):
        try:
            _fetch(file, path, progress)
            break
        except _TryAgainError as error:
            if attempt + 1 == ATTEMPTS:
                raise DataError(_unreachable(file, path, str(error))) from error
            time.sleep(pause * 2**attempt)
    _check_kind(file, part, path)
    found = _check(part, file.sha256)
    _digest_file(path).write_text(found + "\n")
    part.replace(path)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _fetch(file: RemoteFile, path: Path, progress: Progress) -> None:
    """Append to the part of ``path`` what it still lacks. Raises _TryAgainError or DataError."""
    part = _part(path)
    start = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(file.url, headers={"User-Agent": "crystalformer"})  # registered
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            if answer.status not in (http.HTTPStatus.OK, http.HTTPStatus.PARTIAL_CONTENT):
                raise _TryAgainError(f"HTTP status {answer.status}")
            start = start if answer.status == http.HTTPStatus.PARTIAL_CONTENT else 0
            if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                part.unlink()
                raise _TryAgainError(f"the server did not go on at byte {start}")
            _copy(answer, part, start, lambda done, total: progress(f"download {file.name}", done, total))
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            part.unlink()
            raise _TryAgainError("the partial file did not fit the server's") from error
        if error.code in _RETRY_STATUS:
            raise _TryAgainError(f"HTTP status {error.code}") from error
        raise DataError(_unreachable(file, path, f"the server answered {error.code} {error.reason}")) from error
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise _broken_off(error) from error


def _broken_off(error: Exception) -> _TryAgainError:
    return _TryAgainError(str(getattr(error, "reason", error)) or repr(error))


def _copy(answer: http.client.HTTPResponse, part: Path, start: int, progress: Callable[[int, int], None]) -> None:
    """Write what is left of the answer behind the first ``start`` bytes. Raises _TryAgainError or DataError."""
    length = _length(answer)
    total = start + length if length is not None else 0
    done = start
    try:
        with part.open("ab" if start else "wb") as stream:
            while piece := _next_piece(answer):
                stream.write(piece)
                done += len(piece)
                progress(done, total)
    except OSError as error:  # of the disk: the connection's are told otherwise
        reason = error.strerror or error
        raise DataError(f"{part}: cannot be written: {reason}; started again, it goes on from there") from error
    if total and done != total:
        raise _TryAgainError(f"the connection closed after {done} of {total} bytes")


def _length(answer: http.client.HTTPResponse) -> int | None:
    """Bytes that the server says are to come; None where it says nothing of the kind."""
    try:
        length = int(answer.headers.get("Content-Length", ""))
    except ValueError:
        return None
    return length if length >= 0 else None


def _next_piece(answer: http.client.HTTPResponse) -> bytes:
    """The next bytes, none at the end. Raises _TryAgainError."""
    try:
        return answer.read(_PIECE)
    except (http.client.HTTPException, OSError) as error:
        raise _broken_off(error) from error


def _check_kind(file: RemoteFile, part: Path, path: Path) -> None:
    """Refuse, and delete, what does not begin as a file of its ending does: a proxy's page, say, or nothing at all.

    Pickles begin in many ways, but not as HTML and JSON do.
    """
    with part.open("rb") as stream:
        start = stream.read(40)
    wanted = _BEGINNINGS.get(path.suffix, b"")
    if not start.startswith(wanted) or start.lstrip()[:1] in (b"", b"<", b"{"):
        part.unlink()
        raise DataError(_unreachable(file, path, f"the answer is no such file, it begins with {start!r}"))


def _check(path: Path, wanted: str) -> str:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if wanted and found != wanted:
        raise DataError(f"{path}: damaged: sha256 is {found}, not {wanted}; delete it to download it again")
    return found


def _unreachable(file: RemoteFile, path: Path, reason: str) -> str:
    return (
        f"cannot reach {urlparse(file.url).netloc} for {file.name} ({reason}); use an embedded data set "
        f"({', '.join(embedded_names())}), or put the file from {file.url} at {path}"
    )
