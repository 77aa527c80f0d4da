"""Several Ray nodes on this machine: a run lives through the loss of one, and follows the cluster's size."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray.cluster_utils import Cluster

import cluster  # noqa: F401 - sets Ray's environment
from cluster.run.report import read_metrics
from tests.cluster.runs import TIMEOUT, Run, command_line, errors, numbers, training_workers


class Node:
    """A Ray node of one CPU beside the head, which takes no work."""

    def __init__(self, ray_cluster: Cluster) -> None:
        self._node = ray_cluster.add_node(num_cpus=1)
        here = psutil.Process().children(recursive=True)
        name = f"--node_id={self._node.node_id}" if hasattr(self._node, "node_id") else self._node.unique_id
        found = [p for p in here if name in command_line(p) and "raylet" in p.name()]
        self.raylet = found[0]

    def trains(self) -> bool:
        """Whether a training worker runs on it."""
        return bool(training_workers(self.raylet.pid))

    def kill(self) -> None:
        """All of it at once, as when the machine goes."""
        doomed = [self.raylet, *self.raylet.children(recursive=True)]
        for process in doomed:
            process.send_signal(signal.SIGSTOP)  # so that none of them sees another one die
        for process in doomed:
            process.kill()


@pytest.fixture(scope="module")
def ray_cluster():
    ray = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray, "get-auth-token", "--generate"], check=True, capture_output=True)
    # A lost node is noticed after some 3 s, for Ray's 15: what a run does then is looked at, not how long Ray waits.
    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": quick}
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def nodes(ray_cluster):
    return [Node(ray_cluster) for _ in range(3)]


@pytest.fixture(scope="module")
def start(ray_cluster, elastic, tmp_path_factory):
    folder, common = tmp_path_factory.mktemp("nodes"), {"cpus_per_worker": 1, "data_dir": str(elastic.path.parent)}
    return lambda name, **settings: Run(folder, name, ray_cluster.address, **common, **settings)


@pytest.fixture(scope="module")
def whole(start, nodes):
    """Two workers, and nothing happens to them."""
    run = start("whole", num_workers=2)
    text = run.end()
    assert run.process.returncode == 0, text
    return run


def test_a_lost_node_costs_the_work_since_the_last_checkpoint(start, nodes, whole):
    run = start("lost", num_workers=2)
    run.wait_for_checkpoint()
    lost = next(node for node in nodes if node.trains())
    lost.kill()
    nodes.remove(lost)
    text = run.end()
    assert run.process.returncode == 0, text
    assert "resuming after step" in text
    assert numbers(run.folder) == numbers(whole.folder)
    assert errors(run.folder) == errors(whole.folder)


def test_the_number_of_workers_follows_the_cluster(ray_cluster, start, nodes, whole):
    def until_workers(count):
        deadline = time.monotonic() + TIMEOUT
        while sum(node.trains() for node in nodes) != count:
            assert run.process.poll() is None, run.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        run.wait_for(read_metrics(run.folder)[-1]["epoch"] + 3)

    # No checkpoint is due: the one before the run grows is that of its growing.
    long = {"epochs": 5000, "swa_epochs": 0, "checkpoint_every": 5000, "checkpoint_minutes": 60}
    run = start("elastic", num_workers="1-3", elastic_seconds=4, **long)
    run.wait_for(1)
    until_workers(2)
    assert not run.checkpoints()
    nodes.append(Node(ray_cluster))
    until_workers(3)
    lost = nodes.pop()
    lost.kill()
    until_workers(2)
    os.kill(run.process.pid, signal.SIGTERM)
    text = run.end()
    assert run.process.returncode == 128 + signal.SIGTERM, text
    assert text.count("resuming after step") >= 2
    for mine, theirs in zip(numbers(run.folder)[:8], numbers(whole.folder)[:8], strict=True):
        assert mine == pytest.approx(theirs, rel=2e-3)
    rows = read_metrics(run.folder)
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
