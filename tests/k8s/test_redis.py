"""The command of the Redis that keeps Ray's control store, as rendered, run by a real bash."""

import os
import re
import subprocess

import pytest

from tests.k8s.rendered import OVERLAYS, documents, needs_kubectl

pytestmark = needs_kubectl


def redis():
    """The container of the overlays that have one, and its command: the same in all."""
    found = [
        item["spec"]["template"]["spec"]["containers"][0]
        for overlay in OVERLAYS
        for item in documents(overlay)
        if (item["kind"], item["metadata"]["name"]) == ("StatefulSet", "redis")
    ]
    assert found and all(container == found[0] for container in found)
    return found[0]


def start(folder, password):
    """Run the container's command with a redis-server that writes down its arguments and standard input."""
    server = folder / "redis-server"
    server.write_text(f'#!/bin/bash\necho "$*" > {folder}/arguments\ncat > {folder}/configuration\n')
    server.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "REDIS_PASSWORD": password}
    return subprocess.run(redis()["command"], env=environment, capture_output=True, text=True, timeout=30)


def unquoted(value):
    """What Redis makes of a value between double quotes (sdssplitargs)."""
    assert re.fullmatch(r'"(?:[^"\\]|\\.)*"', value), value
    return re.sub(r"\\(.)", lambda match: {"n": "\n"}.get(match[1], match[1]), value[1:-1])


@pytest.mark.parametrize(
    "password",
    [
        "0123456789abcdef",
        "two words  and three",
        'it\'s "quoted"',
        r"back\slash\\es\n\"",
        "$HOME `id` $(id) & # ${PATH}",
        "one line\nrequirepass other",
        " ",
        "END",
    ],
)
def test_redis_gets_one_directive_a_line(password, tmp_path):
    done = start(tmp_path, password)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "configuration").read_text().splitlines()
    assert lines[:2] == ["dir /data", "appendonly yes"] and len(lines) == 3
    name, _, value = lines[2].partition(" ")
    assert (name, unquoted(value)) == ("requirepass", password)
    assert (tmp_path / "arguments").read_text() == "-\n", "arguments are seen by all that may list processes"


def test_redis_does_not_start_without_a_password(tmp_path):
    done = start(tmp_path, "")
    assert done.returncode != 0 and "REDIS_PASSWORD: is empty" in done.stderr
    assert not (tmp_path / "configuration").exists()
