"""What ``import cluster`` sets for Ray, in a command and in the processes of a Ray."""

import os
import subprocess
import sys

import pytest

from cluster.environment import LOOPBACK_ONLY, NO_PREEMPTION_WATCHER

OF_THIS_MACHINE = dict([LOOPBACK_ONLY, NO_PREEMPTION_WATCHER])


@pytest.mark.parametrize(
    ("address", "program", "expected"),
    [
        ("", "crystalformer", OF_THIS_MACHINE),
        ("127.0.0.1:6379", "crystalformer", OF_THIS_MACHINE),
        ("10.1.2.3:6379", "crystalformer", {}),
        # As a process on the head of a KubeRay cluster: nodes are drained there, which the controller is to see.
        ("127.0.0.1:6379", "/lib/ray/default_worker.py", {}),
    ],
)
def test_what_is_of_this_machine_alone_is_judged_by_commands(address, program, expected):
    code = (
        f"import json, os, sys; sys.argv[0] = {program!r}; import cluster; "
        f"print(json.dumps({{name: os.environ[name] for name in {list(OF_THIS_MACHINE)} if name in os.environ}}))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in OF_THIS_MACHINE}
    environment = {**kept, "RAY_ADDRESS": address}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=180)
    assert done.stdout.strip().replace('"', "'") == str(expected), done.stderr


def test_what_comes_after_ray_was_left_starts_no_other_ray():
    """As a thread of Ray's own may, which is still at work when a command has ended its Ray."""
    done = subprocess.run(
        [sys.executable, "-c", "import cluster, ray; ray.put(1)"], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 1
    assert "Ray has not been started yet" in done.stderr.splitlines()[-1]
