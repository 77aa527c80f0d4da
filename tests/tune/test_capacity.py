"""How many trials run at once: what they reserve fits the nodes, and is what a run would reserve."""

from datetime import datetime

import pytest
import ray

import tune  # noqa: F401 - sets Ray's environment
from cluster.driver.launch import worker_resources
from cluster.driver.room import WorkerResources
from cluster.settings.config import TrainConfig
from tune.capacity import capacity_of
from tune.folder import new_search


@pytest.fixture
def reckoned(monkeypatch, tmp_path):
    """``reckoned(nodes, settings)``: the capacity of nodes of (CPUs, GPUs), and what launch reserves for a trial."""

    def make(nodes, **settings):
        found = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
        monkeypatch.setattr(ray, "nodes", lambda: found)
        plan = new_search({"target": ["shear"], "storage_path": str(tmp_path), **settings}, {}, datetime.now())
        capacity = capacity_of(plan)
        return capacity, worker_resources(TrainConfig.from_flat(plan.config.to_flat() | dict(capacity.config)))

    return make


@pytest.mark.parametrize(
    ("nodes", "settings", "trials", "threads", "workers"),
    [
        ([(4, 0)], {"num_workers": 2}, 2, 1, {"CPU": 0.99}),
        ([(4, 0)], {"num_workers": 2, "cpus_per_worker": 2.0}, 1, 2, {"CPU": 1.98}),
        ([(2, 0)], {"num_workers": 4}, 1, 1, {"CPU": 0.495}),
        ([(1.5, 0), (1.5, 0)], {"num_workers": 3, "cpus_per_worker": 0.75}, 1, 1, {"CPU": 0.7425}),
        ([(8, 8)], {"num_workers": 2}, 4, 1, {"CPU": 0.99, "GPU": 1.0}),
        ([(8, 1)], {"num_workers": 2}, 4, 1, {"CPU": 0.99}),
        ([(16, 2)], {"num_workers": "1-4"}, 1, 1, {"CPU": 0.99, "GPU": 1.0}),
        ([(8, 0)], {"num_workers": "1-4"}, 2, 1, {"CPU": 0.99}),
    ],
)
def test_trials_of_several_workers_fit_with_the_processes_beside_them(
    reckoned, nodes, settings, trials, threads, workers
):
    capacity, reserved = reckoned(nodes, **settings)
    assert capacity.trials == trials
    assert reserved == WorkerResources(threads=threads, resources=workers, gpu="GPU" in workers)
    most = 4 if settings["num_workers"] == "1-4" else settings["num_workers"]
    beside = capacity.resources.required_resources["CPU"]
    if "GPU" not in workers:
        assert trials * (most * workers["CPU"] + beside) <= sum(cpus for cpus, _ in nodes)


def test_a_trial_of_one_worker_takes_a_whole_cpu_where_there_is_one(reckoned):
    capacity, _ = reckoned([(64, 1)])
    assert (capacity.trials, capacity.resources.required_resources) == (1, {"CPU": 1.0, "GPU": 1.0})
    capacity, _ = reckoned([(0.5, 0)])
    assert (capacity.trials, capacity.resources.required_resources) == (1, {"CPU": 0.5})
