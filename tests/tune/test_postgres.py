"""A study in a real PostgreSQL server: searches share it, its password stays out of files, a restart is survived."""

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from pathlib import Path

import optuna
import pytest

from cluster.cli import main
from cluster.errors import UserError
from tests.tune.test_study import SPACE, begin, make_book, run
from tune.book import records
from tune.folder import saved_search
from tune.study import VARIABLE, open_storage, reason_of

PASSWORD = "not/in:any@file"


def tool(name):
    """A program of PostgreSQL; Debian keeps them out of PATH."""
    places = [os.environ.get("PATH", ""), *map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))]
    return shutil.which(name, path=os.pathsep.join(places))


def other_user():
    """PostgreSQL refuses to run as root: the user to be instead, or None to stay."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), "")


class Server:
    """A PostgreSQL server of the test's own, on loopback, in a temporary folder."""

    def __init__(self, folder, user):
        self.user, self.data = user, folder / "data"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        (folder / "password").write_text(PASSWORD)
        if user is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        self._run("initdb", "-D", self.data, "-U", "tuner", "-A", "scram-sha-256", f"--pwfile={folder}/password")
        self.start()

    def _run(self, name, *words):
        done = subprocess.run(
            [tool(name), *map(str, words)],
            user=self.user,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr

    def start(self):
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "-D", self.data, "-w", "-l", self.data.parent / "log", "-o", options, "start")

    def stop(self):
        self._run("pg_ctl", "-D", self.data, "-w", "-m", "immediate", "stop")

    @property
    def url(self):
        from urllib.parse import quote

        return f"postgresql://tuner:{quote(PASSWORD, safe='')}@127.0.0.1:{self.port}/postgres"


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("psycopg", reason="needs psycopg, PostgreSQL's driver")
    if tool("initdb") is None or tool("pg_ctl") is None:
        pytest.skip("needs a PostgreSQL server (Debian: apt-get install postgresql)")
    user = other_user()
    if user == "":
        pytest.skip("PostgreSQL does not run as root, and there is no user postgres or nobody")
    folder = Path(tempfile.mkdtemp(prefix="crystalformer-postgres-"))
    started = Server(folder, user)
    yield started
    started.stop()
    shutil.rmtree(folder)


def test_searches_at_once_share_a_study_and_repeat_nothing(server):
    begin(server.url, "shared")
    errors = []

    def one(name):
        try:
            book, _ = make_book(begin(server.url, "shared"), 8, search=name)
            run(book)
        except Exception as error:  # noqa: BLE001 - raised in the test
            errors.append(error)

    threads = [threading.Thread(target=one, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    trials = records(begin(server.url, "shared"), SPACE)
    assert [trial.number for trial in trials] == list(range(16))
    assert sorted(trial.search for trial in trials) == ["one"] * 8 + ["two"] * 8
    assert len({tuple(trial.settings.values()) for trial in trials}) == 16
    assert all(trial.ended for trial in trials)
    with pytest.raises(UserError, match="study 'shared' was begun with dataset 'd', now it is 'e'"):
        begin(server.url, "shared", dataset="e")


def test_suggestions_are_those_of_a_file(server, tmp_path):
    found = []
    for url in (server.url, f"sqlite:///{tmp_path}/study.db"):
        book, _ = make_book(begin(url, "same"), 13)
        found.append([suggestion.settings for suggestion in run(book)])
    assert found[0] == found[1]


def test_a_restart_of_the_server_between_trials_is_survived(server):
    study = begin(server.url, "restarted")
    book, told = make_book(study, 2)
    run(book, until=1)
    server.stop()
    server.start()
    run(book)
    assert [trial.number for trial in told] == [0, 1]


def test_a_server_that_is_gone_ends_the_search_with_the_reason_kept(server):
    book, _ = make_book(begin(server.url, "gone"), 2)
    number = book.next().number
    server.stop()
    try:
        with book.watching():
            book.epochs_done(number, [0.5])
    finally:
        server.start()
    assert book.closed
    assert re.search("connect|terminat", reason_of(book.problem, server.url))
    again, told = make_book(begin(server.url, "gone"), 2)
    assert [suggestion.number for suggestion in run(again)] == [number, number + 1]
    assert len(told) == 2


def test_a_wrong_password_is_told_without_it(server):
    url = server.url.replace("not", "wrong")
    with pytest.raises(UserError, match=r"storage postgresql://127\.0\.0\.1:\d+/postgres cannot be opened") as caught:
        open_storage(url)
    for secret in ("wrong", "any@file", "tuner:"):
        assert secret not in str(caught.value)
    assert "password authentication failed" in str(caught.value)


def test_a_search_whose_study_is_in_postgresql(server, settings, tmp_path, monkeypatch, capsys):
    """The address comes from the environment, and neither user nor password is in any file of the run."""
    monkeypatch.setenv(VARIABLE, server.url)
    words = [f"--{name}={value[0] if isinstance(value, list) else value}" for name, value in settings.items()]
    where = ["--run_name=far", f"--storage_path={tmp_path}"]
    assert main(["tune", *words, *where, "--num_trials=1", "--epochs=1"]) == 0
    assert "best trial  0: validation MAE gap" in capsys.readouterr().out
    study = optuna.load_study(study_name="far", storage=open_storage(server.url))
    assert len(study.trials) == 1
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        for secret in (PASSWORD, "any%40file", "tuner"):
            assert secret.encode() not in path.read_bytes(), path
    assert not list(tmp_path.rglob("*.db"))

    monkeypatch.delenv(VARIABLE)
    assert main(["tune", *where, "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"postgresql://127.0.0.1:{server.port}/postgres; name it with --storage or {VARIABLE}" in error
    again = saved_search({"run_name": "far", "storage_path": str(tmp_path), "resume": True}, {"storage": server.url})
    assert again.url == server.url
