"""``make dashboard``, ``submit`` and ``down``: a real head, real jobs over its HTTP API, nothing left behind."""

import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster.head import main
from tests.cluster.small import SMALL

REPOSITORY = Path(__file__).resolve().parents[2]
TIMEOUT = 480


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home):
    """``head(*words)`` runs ``python -m cluster.head`` with a home of its own; gives status and output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"HOME": str(home), "CRYSTALFORMER_HOME": str(home)}

    def run(*words):
        command = [sys.executable, "-m", "cluster.head", "--folder", str(home / "head"), *words]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        return done.returncode, done.stdout + done.stderr

    yield run
    run("down")


@pytest.fixture(scope="module")
def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def running(head, home, port):
    """The head's processes, once it is up; what was printed."""
    status, text = head("up", "--port", str(port))
    assert status == 0, text
    leader = psutil.Process(json.loads((home / "head" / "head.json").read_text())["pid"])
    return [leader, *leader.children(recursive=True)], text


def test_it_says_where_it_is_and_is_started_once(head, running, port):
    text = running[1]
    assert f"dashboard   http://127.0.0.1:{port}" in text and "make down" in text
    assert head("up") == (0, text)


def test_it_listens_on_loopback_only_and_asks_for_a_token(running, port):
    listening = {
        connection.laddr.ip
        for process in running[0]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening and listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/api/jobs/", timeout=30)
    assert refused.value.code == 401


def test_a_job_trains_and_its_run_lasts(head, running, home):
    settings = {**SMALL, "num_layers": 1, "epochs": 1, "run_name": "job", "threads_per_worker": 1}
    words = [
        f"--{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in settings.items()
    ]
    status, text = head("submit", f"train --target shear {' '.join(words)}")
    assert status == 0, text
    assert "succeeded" in text
    results = json.loads((home / "runs" / "job" / "results.json").read_text())
    assert 0 < results["test_mae"]["shear"] < 3
    assert (home / "data" / "elastic_tensor_2015" / "dataset.json").is_file()


def test_a_job_that_fails_says_why(head, running):
    status, text = head("submit", "train --target nothing")
    assert status != 0
    assert "error: " in text and "nothing" in text


def test_down_leaves_nothing(head, running, home):
    processes = running[0]
    assert any(p.is_running() and p.name() == "raylet" for p in processes)
    status, text = head("down")
    assert status == 0 and text.startswith("stopped the head at"), text
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert head("down") == (0, f"no head of {home / 'head'} is running\n")
    status, text = head("submit", "train --target shear")
    assert (status, text.count("\n")) == (2, 1) and text.startswith("error: no Ray head to submit to")


def test_a_port_in_use_is_one_line(head):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, text = head("up", "--port", str(taken.getsockname()[1]))
    assert (status, text.count("\n")) == (2, 1)
    assert "cannot be used for the dashboard" in text


def test_a_folder_that_cannot_be_made_is_told(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--folder", str(tmp_path / "file" / "head"), "up"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file' / 'head'}: Not a directory\n"
