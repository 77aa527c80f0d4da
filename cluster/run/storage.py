"""Where runs are kept: a folder that all nodes see, or an object store such as s3://.

Checkpoints go there straight from the workers. The rest of a run folder is small and written by the driver: for an
object store into a local copy, whose changed files are sent on, at most every ``PUSH_SECONDS`` while the run goes on.
Credentials are the environment's (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...), never part of a path.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType, copy_files

from cluster.errors import UserError, without_credentials
from cluster.log import say

PUSH_SECONDS = 15.0
"""While a run goes on, its changed files are sent to an object store at most this often."""

PROBE_BYTES = 2**20
"""Written before a run begins, and deleted: an empty file fits on a full disk too."""

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs")

AZURE = ("abfs", "abfss")


def is_remote(location: str) -> bool:
    """Whether ``location`` is a URI rather than a path."""
    return "://" in location


class RunStore:
    """The place of one run. ``folder`` is local: the run folder itself, or a copy whose changes ``push`` sends on."""

    def __init__(self, storage_path: str, run_name: str) -> None:
        """``storage_path``: a folder or a URI such as s3://bucket/runs. UserError for a URI that cannot be used."""
        self._sent: dict[str, tuple[int, int]] = {}
        self._last_push = -PUSH_SECONDS
        self.filesystem: Any = None
        """pyarrow's, of an object store; None for a folder."""
        if not is_remote(storage_path):
            if Path(storage_path).is_symlink() and not Path(storage_path).exists():
                leads = os.readlink(storage_path)
                raise UserError(f"storage_path {storage_path!r} leads to {leads!r}, which is not there")
            self.folder = (Path(storage_path) / run_name).resolve()
            self.location = str(self.folder)
            return
        self.filesystem, root = _open(storage_path, "storage_path")
        self._path = f"{root.rstrip('/')}/{run_name}"
        parts = urlsplit(storage_path)
        self.location = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{run_name}"))
        self.folder = Path(tempfile.mkdtemp(prefix="crystalformer-run-"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it. Why a run ended is told rather than that, besides, its last files could not be sent."""
        with suppress(UserError) if error is not None else nullcontext():
            self.close()

    @property
    def ray_storage(self) -> dict[str, Any]:
        """What Ray Train's RunConfig takes: name and storage_path, and the file system of an object store."""
        if self.filesystem is None:
            return {"name": self.folder.name, "storage_path": str(self.folder.parent)}
        parent, _, name = self._path.rpartition("/")
        return {"name": name, "storage_path": parent, "storage_filesystem": self.filesystem}

    def holds(self, name: str) -> bool:
        """Whether the run has the file ``name``. UserError where the object store does not answer."""
        if self.filesystem is None:
            return (self.folder / name).is_file()
        with _explained(self.location):
            return bool(self.filesystem.get_file_info(f"{self._path}/{name}").type == FileType.File)

    def pull(self, *names: str) -> None:
        """Copy the run's files of these names into ``folder``; those that are not there are passed over."""
        if self.filesystem is None:
            return
        with _explained(self.location):
            for name in names:
                if self.holds(name):
                    copy_files(f"{self._path}/{name}", str(self.folder / name), source_filesystem=self.filesystem)
                    self._sent[name] = _state(self.folder / name)

    def push(self, *, now: bool = False) -> None:
        """Send the files that have changed; nothing where the last time was a moment ago, unless ``now``.

        UserError where they cannot be sent.
        """
        if self.filesystem is None or not (now or time.monotonic() - self._last_push >= PUSH_SECONDS):
            return
        try:
            with _explained(self.location):
                for file in sorted(path for path in self.folder.rglob("*") if path.is_file()):
                    self._send(file)
        finally:
            self._last_push = time.monotonic()

    def _send(self, file: Path) -> None:
        name, state = file.relative_to(self.folder).as_posix(), _state(file)
        if self._sent.get(name) != state:
            with self.filesystem.open_output_stream(f"{self._path}/{name}") as stream:
                stream.write(file.read_bytes())
            self._sent[name] = state

    def check_writable(self) -> None:
        """Write and delete a file. UserError says why that is not possible."""
        name = f".writable-{os.getpid()}"
        if self.filesystem is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    (self.folder / name).write_bytes(bytes(PROBE_BYTES))
                finally:
                    (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                place = self.folder.parent
                raise UserError(f"storage_path {str(place)!r} cannot be written: {error.strerror}") from error
            return
        with _explained(self.location):
            with self.filesystem.open_output_stream(f"{self._path}/{name}") as stream:
                stream.write(bytes(PROBE_BYTES))
            self.filesystem.delete_file(f"{self._path}/{name}")

    def delete(self, *names: str) -> None:
        """Delete files of the run, and its folder where nothing is left in it."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        if self.filesystem is None:
            with suppress(OSError):  # something is left
                self.folder.rmdir()
            return
        with _explained(self.location):
            for name in names:
                if self._sent.pop(name, None) is not None:
                    self.filesystem.delete_file(f"{self._path}/{name}")

    def close(self) -> None:
        """Send what is left and drop the local copy; it stays, and its place is told, where sending fails."""
        if self.filesystem is None:
            return
        try:
            self.push(now=True)
        except UserError:
            say(f"warning: files of the run could not be sent to {self.location} and are kept in {self.folder}")
            raise
        shutil.rmtree(self.folder, ignore_errors=True)


def _state(file: Path) -> tuple[int, int]:
    """What changes when the file does: time of the last change (ns) and size (bytes)."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@contextmanager
def local_folder(location: str, what: str = "location") -> Iterator[Path]:
    """A folder given by path or URI, as a local one: itself, or a copy that lives as long as the context.

    what: the user's word for it. UserError for a URI that cannot be used, or that the object store does not have.
    """
    if not is_remote(location):
        yield Path(location)
        return
    filesystem, path = _open(location, what)
    with tempfile.TemporaryDirectory(prefix="crystalformer-copy-") as copy:
        with _explained(location):
            if not filesystem.get_file_info(FileSelector(path, allow_not_found=True)):
                raise UserError(f"{location}: there is no such folder")
            copy_files(path, copy, source_filesystem=filesystem)
        yield Path(copy)


def send_folder(folder: Path, files: Any, target: str) -> None:  # noqa: ANN401 - pyarrow's file system
    """Copy a local folder's files to the folder ``target`` of ``files``, in the order they were written.

    So the file that vouches for the others comes last. OSError where that fails.
    """
    files.create_dir(target)
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        with files.open_output_stream(f"{target}/{file.name}") as stream:
            stream.write(file.read_bytes())


def remove_folder(files: Any, target: str) -> None:  # noqa: ANN401 - pyarrow's file system
    """Delete the folder ``target`` of ``files`` as far as it is there; it may fail, which changes nothing else."""
    with suppress(OSError, ArrowException):
        if files.get_file_info(target).type == FileType.Directory:
            files.delete_dir(target)


def _open(uri: str, what: str) -> tuple[Any, str]:
    """pyarrow's file system of a URI and the path in it. UserError for a URI that cannot be used names ``what``."""
    if _holds_credentials(uri):  # before any message that repeats it
        raise UserError(f"{what} must not hold credentials; set AWS_ACCESS_KEY_ID and the like instead")
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"{what} must be a URI, got {uri!r}: {error}") from error
    if parts.scheme not in SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise UserError(f"{what} must be a folder or begin with one of {allowed}, got {uri!r}")
    if not parts.netloc:
        raise UserError(f"{what} must name a bucket, got {uri!r}")
    with _explained(uri):
        filesystem, path = FileSystem.from_uri(uri)
    return filesystem, str(path)


def _holds_credentials(uri: str) -> bool:
    """Whether a user, password or signature stands in a URI, be it written so that it cannot be taken apart.

    Azure's user is the container, as in abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/runs.
    """
    scheme, _, rest = "".join(uri.split()).partition("://")
    place = rest.split("/")[0]
    if scheme.lower() in AZURE and re.search(r"[?&](client_secret|sig)=", rest):
        return True
    if scheme.lower() in AZURE and ":" not in place.partition("@")[0]:
        return False
    if scheme.lower() == "hdfs":  # it takes no password: a colon is the port's
        return "@" in place
    return without_credentials(f"://{rest}") != f"://{rest}"


@contextmanager
def _explained(location: str) -> Iterator[None]:
    """Turn the file system's errors into a UserError of one line that names the place."""
    try:
        yield
    except (OSError, ArrowException) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{location}: {first.split(' (Request ID')[0]}") from error
