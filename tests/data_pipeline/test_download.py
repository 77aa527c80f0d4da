"""Downloads resume, are checked, and say clearly why they cannot be."""

import hashlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipeline.download import ATTEMPTS, download
from data_pipeline.errors import DataError
from data_pipeline.info import RemoteFile
from tests.data_pipeline.server import Site, serve

CONTENT = b"PK" + bytes(range(256)) * 4000
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def silent(*_):
    pass


def get(site, folder, path="/files/1", **more):
    file = RemoteFile(url=site.url + path, name="set.zip", **more)
    return download(file, folder, silent, pause=0.0)


def test_resumes_at_the_byte_where_it_broke(tmp_path):
    with serve(Site({"/files/1": CONTENT}, break_after=[300_000, 100_000])) as site:
        path = get(site, tmp_path, sha256=DIGEST)
        assert path.read_bytes() == CONTENT
        assert [wanted for _, wanted in site.seen] == [None, "bytes=300000-", "bytes=400000-"]
        assert get(site, tmp_path) == path and len(site.seen) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.zip.lock", "set.zip", "set.zip.sha256"]


def test_resumes_after_the_program_was_stopped_and_reports_progress(tmp_path):
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:1000])
    seen = []
    with serve(Site({"/files/1": CONTENT})) as site:
        file = RemoteFile(url=site.url + "/files/1", name="set.zip")
        download(file, tmp_path, lambda *call: seen.append(call), pause=0.0)
        assert site.seen == [("/files/1", "bytes=1000-")]
    assert (tmp_path / "set.zip").read_bytes() == CONTENT
    assert seen[-1] == ("download set.zip", len(CONTENT), len(CONTENT)) and seen[0][1] > 1000


@pytest.mark.parametrize("length", ["abc", "-5", "9" * 5000])
def test_a_length_that_is_no_number_counts_as_none(length, tmp_path):
    with serve(Site({"/files/1": CONTENT}, length=length)) as site:
        assert get(site, tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_and_a_part_that_does_not_fit(tmp_path):
    (tmp_path / "set.zip.part").write_bytes(b"x" * 1000)
    with serve(Site({"/files/1": CONTENT}, ranges=False)) as site:
        assert get(site, tmp_path).read_bytes() == CONTENT
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "set.zip.part").write_bytes(b"x" * (len(CONTENT) + 5))
    with serve(Site({"/files/1": CONTENT})) as site:
        assert get(site, tmp_path / "b").read_bytes() == CONTENT


def test_redirects_keep_the_range(tmp_path):
    with serve(Site({"/files/1": CONTENT}, redirects={"/go": "/files/1"}, break_after=[5000])) as site:
        assert get(site, tmp_path, path="/go").read_bytes() == CONTENT
        assert site.seen[-1] == ("/files/1", "bytes=5000-")


def test_a_range_that_begins_elsewhere_is_not_appended(tmp_path):
    (tmp_path / "set.zip.part").write_bytes(CONTENT[:1000])
    with serve(Site({"/files/1": CONTENT}, shift=7)) as site:
        assert get(site, tmp_path).read_bytes() == CONTENT
        assert [wanted for _, wanted in site.seen] == ["bytes=1000-", None]


def test_busy_server_is_asked_again(tmp_path):
    with serve(Site({"/files/1": CONTENT}, status=[503, 429])) as site:
        assert get(site, tmp_path).read_bytes() == CONTENT
        assert len(site.seen) == 3


def test_damage_is_found(tmp_path):
    with serve(Site({"/files/1": CONTENT})) as site:
        with pytest.raises(DataError, match=r"damaged: sha256 is .*, not 0000"):
            get(site, tmp_path / "a", sha256="0" * 64)
        assert not (tmp_path / "a" / "set.zip").exists()
        path = get(site, tmp_path)
        path.write_bytes(CONTENT[:-1])
        with pytest.raises(DataError, match="delete it to download it again"):
            get(site, tmp_path)


@pytest.mark.parametrize("name", ["set.zip", "set.pkl", "set.json.gz"])
@pytest.mark.parametrize(
    ("content", "success", "message"),
    [
        (b"", 202, "HTTP status 202"),
        (CONTENT, 202, "HTTP status 202"),
        (b"", 200, "it begins with b''"),
        (b" <html>Login to the proxy</html>", 200, "it begins with b' <html>Login"),
    ],
)
def test_what_is_not_the_file_is_not_kept(content, success, message, name, tmp_path):
    with serve(Site({"/files/1": content}, success=success)) as site:
        with pytest.raises(DataError, match=rf"cannot reach 127.0.0.1:\d+ for {name} \(.*{message}") as caught:
            download(RemoteFile(url=site.url + "/files/1", name=name), tmp_path, silent, pause=0.0)
    assert "\n" not in str(caught.value) and [p.name for p in tmp_path.iterdir()] == [f".{name}.lock"]


def test_refused_and_unreachable_are_one_clear_line(tmp_path):
    with serve(Site({})) as site:
        with pytest.raises(DataError, match="the server answered 404"):
            get(site, tmp_path)
        assert len(site.seen) == 1
    with serve(Site({"/files/1": CONTENT}, status=[403])) as site:
        refused = r"cannot reach 127.0.0.1:\d+ for set.zip \(the server answered 403 Forbidden\); .*elastic_tensor_20"
        with pytest.raises(DataError, match=refused) as caught:
            get(site, tmp_path)
        assert len(site.seen) == 1 and "\n" not in str(caught.value)
    with pytest.raises(
        DataError, match=r"cannot reach 127.0.0.1:\d+ for set.zip .*elastic_tensor_2015, flla"
    ) as caught:
        get(site, tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path / "set.zip") in str(caught.value)
    with serve(Site({"/files/1": CONTENT}, status=[503] * ATTEMPTS)) as site:
        with pytest.raises(DataError, match="HTTP status 503"):
            get(site, tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full, a disk without room")
def test_a_full_disk_is_not_told_as_an_unreachable_server(tmp_path):
    (tmp_path / "set.zip.part").symlink_to("/dev/full")
    with serve(Site({"/files/1": CONTENT})) as site:
        with pytest.raises(DataError, match=r"set\.zip\.part: cannot be written: No space left on device") as caught:
            get(site, tmp_path)
        assert len(site.seen) == 1 and "cannot reach" not in str(caught.value)


ANOTHER = """
import sys
from pathlib import Path
from data_pipeline.download import download
from data_pipeline.info import RemoteFile
print("ready", flush=True)
path = download(RemoteFile(url=sys.argv[1], name="set.zip"), Path(sys.argv[2]), lambda *_: None)
sys.exit(path.name != "set.zip")
"""


def test_processes_that_want_one_file_download_it_once(tmp_path):
    """As two data sets of one source do, prepared at the same time."""
    with serve(Site({"/files/1": CONTENT}, gate=threading.Event())) as site:
        words = [sys.executable, "-c", ANOTHER, site.url + "/files/1", str(tmp_path)]
        others = [
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
        ]
        assert [other.stdout.readline() for other in others] == ["ready\n"] * 3
        while not site.seen:
            time.sleep(0.01)
        time.sleep(0.5)
        site.gate.set()
        said = [other.communicate(timeout=60)[1] for other in others]
        assert ([other.returncode for other in others], said) == ([0] * 3, [""] * 3)
    assert len(site.seen) == 1
    assert (tmp_path / "set.zip").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_to_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with serve(Site({"/files/1": CONTENT})) as site:
        with pytest.raises(DataError, match="file/downloads: cannot be made: Not a directory"):
            get(site, tmp_path / "file" / "downloads")
        (tmp_path / ".set.zip.lock").mkdir()
        with pytest.raises(DataError, match=r"cannot be written to: \.set\.zip\.lock: Is a directory"):
            get(site, tmp_path)
        assert site.seen == []


def test_a_whole_file_is_used_where_nothing_can_be_written(tmp_path):
    (tmp_path / "set.zip").write_bytes(CONTENT)
    (tmp_path / ".set.zip.lock").mkdir()
    assert get(Site({}), tmp_path, sha256=DIGEST) == tmp_path / "set.zip"
