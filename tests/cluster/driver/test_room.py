"""Room for workers on nodes of unlike sizes: each worker has to lie on one of them."""

import pytest

from cluster.driver.room import Node, cpus_that_fit, described, worker_share, workers_that_fit
from cluster.errors import UserError
from cluster.settings.sections import ScaleConfig

HEAD_AND_TWO = [Node(16), Node(64, 8), Node(64, 8)]


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "cpus"),
    [
        ([Node(64)] * 3, 4, False, 32),
        (HEAD_AND_TWO, 16, True, 8),
        (HEAD_AND_TWO, 16, False, 8),
        (HEAD_AND_TWO, 2, True, 64),
        ([Node(4), Node(16)], 2, False, 8),
        ([Node(2)], 1, False, 2),
        ([Node(2)], 2, False, 1),
        ([Node(0), Node(7), Node(7)], 2, False, 7),
        ([Node(7), Node(3)], 3, False, 3),
        ([Node(64, 1), Node(64, 7)], 8, True, 9),
        ([Node(0, 8), Node(64, 8)], 8, True, 8),
        ([Node(2)], 3, False, 0.6666),
        ([Node(2)], 4, False, 0.5),
        ([Node(1), Node(1)], 3, False, 0.5),
        ([Node(2, 4)], 4, True, 0.5),
    ],
)
def test_the_most_cpus_that_fit(nodes, workers, gpu, cpus):
    assert cpus_that_fit(nodes, workers, gpu=gpu) == cpus
    assert workers_that_fit(nodes, cpus, gpu=gpu) >= workers
    more = cpus + 1 if cpus >= 1 else cpus + 1e-4
    assert workers_that_fit(nodes, more, gpu=gpu) < workers


@pytest.mark.parametrize(
    ("nodes", "gpu"),
    [([], False), ([Node(0)], False), ([Node(0, 8)], True), ([Node(8)], True), ([Node(64, 1)], True)],
)
def test_no_room_at_any_number_of_cpus(nodes, gpu):
    assert cpus_that_fit(nodes, 2, gpu=gpu) == 0


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpu", "workers"),
    [
        ([Node(64)] * 3, 48, False, 3),
        (HEAD_AND_TWO, 9, True, 14),
        ([Node(4), Node(16)], 10, False, 1),
        ([Node(2)], 64, False, 0),
        ([Node(0.9)], 0.3, False, 3),  # 0.9 // 0.3 is 2
        ([Node(2)], 1e-9, False, 20_000),  # Ray reckons in ten-thousandths
        ([Node(64, 2)], 1, True, 2),
        ([], 1, False, 0),
    ],
)
def test_how_many_workers_fit(nodes, cpus, gpu, workers):
    assert workers_that_fit(nodes, cpus, gpu=gpu) == workers


def test_nodes_in_words():
    assert described([*HEAD_AND_TWO, Node(0)]) == "1 node of 16 CPUs, 2 nodes of 64 CPUs and 8 GPUs"
    assert described([Node(1), Node(0.5, 1)]) == "1 node of 0.5 CPUs and 1 GPU, 1 node of 1 CPU"
    assert described([Node(0)]) == "no node with CPUs"


@pytest.mark.parametrize(
    ("nodes", "settings", "threads", "resources"),
    [
        ([Node(8)], {"num_workers": "2"}, 4, {"CPU": 4}),
        ([Node(8, 2)], {"num_workers": "2"}, 4, {"CPU": 4, "GPU": 1}),
        ([Node(8, 1)], {"num_workers": "2"}, 4, {"CPU": 4}),
        ([Node(8, 2)], {"num_workers": "1-4"}, 4, {"CPU": 4, "GPU": 1}),
        ([Node(8, 2)], {"num_workers": "2", "device": "cpu", "cpus_per_worker": 1.5}, 1, {"CPU": 1.5}),
        ([Node(8)], {"num_workers": "2", "threads_per_worker": 3}, 3, {"CPU": 4}),
        ([], {"num_workers": "2"}, 1, {"CPU": 0}),
    ],
)
def test_the_share_of_a_worker(nodes, settings, threads, resources):
    share = worker_share(ScaleConfig(**settings), nodes)
    assert (share.threads, share.resources, share.gpu, share.cpus) == (
        threads,
        resources,
        "GPU" in resources,
        resources["CPU"],
    )
    assert worker_share(ScaleConfig(**settings), nodes, at_most=2.0).cpus == min(2.0, share.cpus)


@pytest.mark.parametrize(
    ("backend", "nodes", "device"),
    [
        ("triton", [Node(2)], "the CPU on the cluster's 1 node of 2 CPUs"),
        ("numba", [Node(2, 1)], "a GPU on the cluster"),
    ],
)
def test_a_backend_that_is_not_for_the_device_that_was_found(backend, nodes, device):
    """Every start of a worker would end in it."""
    with pytest.raises(UserError, match=f"^backend {backend} is not for it: device auto is {device}"):
        worker_share(ScaleConfig(backend=backend), nodes)
    assert worker_share(ScaleConfig(backend="torch"), nodes).cpus == 2
