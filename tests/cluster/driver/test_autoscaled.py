"""A cluster whose autoscaler has added nothing yet: what a run takes is told, not counted."""

from datetime import datetime
from itertools import chain, repeat

import pytest
import ray

from cluster.driver import launch, room
from cluster.driver.launch import worker_resources
from cluster.driver.room import WorkerResources
from cluster.errors import UserError
from cluster.log import setup_logging
from cluster.prediction.screening import shared_out
from tests.cluster.small import SMALL, small_config
from tune.capacity import awaited_capacity, capacity_of
from tune.folder import new_search

TOLD = {"device": "cuda", "cpus_per_worker": 7.0}


@pytest.fixture
def empty(monkeypatch):
    """A head that takes no tasks, and KubeRay's word that there is an autoscaler."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"memory": 1e9, "node:__internal_head__": 1.0})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 1e9}}])
    monkeypatch.setenv("RAY_enable_autoscaler_v2", "true")


def search(tmp_path, options, **settings):
    flat = {"target": "shear", **SMALL, "storage_path": str(tmp_path), **settings}
    return new_search(flat, options, datetime.now())


def test_a_run_takes_what_it_is_told(empty):
    taken = WorkerResources(threads=7, resources={"CPU": 7.0, "GPU": 1.0}, gpu=True)
    assert worker_resources(small_config(num_workers=2, **TOLD)) == taken


def test_a_search_takes_what_it_is_told(empty, tmp_path):
    capacity = capacity_of(search(tmp_path, {"concurrent": 4}, **TOLD))
    assert capacity.trials == 4
    assert capacity.resources.required_resources == {"CPU": 7.0, "GPU": 1.0}


@pytest.mark.parametrize("missing", TOLD)
def test_what_is_not_told_is_asked_for(empty, missing):
    told = {name: value for name, value in TOLD.items() if name != missing}
    with pytest.raises(UserError, match=f"^{missing} must be given on a cluster with an autoscaler"):
        worker_resources(small_config(**told))


def test_a_search_has_to_know_how_many_trials_run_at_once(empty, tmp_path):
    with pytest.raises(UserError, match="^concurrent must be given"):
        capacity_of(search(tmp_path, {}, **TOLD))


def test_without_an_autoscaler_the_nodes_decide(empty, monkeypatch):
    monkeypatch.delenv("RAY_enable_autoscaler_v2")
    with pytest.raises(UserError, match="2 workers need a GPU each, the cluster has 0"):
        worker_resources(small_config(num_workers=2, **TOLD))


def test_a_screening_has_as_many_actors_as_come(empty):
    """Counted on a head that takes no tasks, one thread would do it all."""
    on_gpus, on_cpus = shared_out("cuda", {}), shared_out("cpu", {})
    assert (on_gpus.actors, on_gpus.gpus) == (None, 1)
    assert (on_cpus.actors, on_cpus.gpus, on_cpus.threads, on_cpus.actor_cpus) == (None, 0, 2, 2)
    with pytest.raises(UserError, match="^device must be given on a cluster with an autoscaler"):
        shared_out("auto", {})


def test_a_screening_counts_the_nodes_where_there_is_no_autoscaler(empty, monkeypatch):
    monkeypatch.delenv("RAY_enable_autoscaler_v2")
    assert (shared_out("auto", {"CPU": 32.0, "GPU": 4.0}).actors, shared_out("cpu", {"CPU": 32.0}).actors) == (4, 8)
    assert shared_out("auto", {"CPU": 2.0}).task_cpus == 0.9
    with pytest.raises(UserError, match="device is cuda, but the cluster has no GPU"):
        shared_out("cuda", {"CPU": 8.0})


@pytest.mark.parametrize(
    ("workers", "told"), [(1, ""), (2, "warning: 2 workers train on CPUs: they need a GPU each, the cluster has 1\n")]
)
def test_gpus_that_do_not_suffice_are_not_passed_over_in_silence(empty, monkeypatch, capsys, workers, told):
    setup_logging()
    monkeypatch.delenv("RAY_enable_autoscaler_v2")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 1.0}}])
    assert launch.awaited_resources(small_config(num_workers=workers)).gpu is (not told)
    assert capsys.readouterr().err == told


def test_nodes_that_are_waited_for_may_come_late(empty, monkeypatch, capsys):
    monkeypatch.delenv("RAY_enable_autoscaler_v2")
    monkeypatch.setattr(room, "NODES_SECONDS", 0.01)
    gpus = chain([0.0, 0.0, 1.0], repeat(2.0))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 14.0, "GPU": next(gpus)}}])
    assert launch.awaited_resources(small_config(num_workers=2, wait_minutes=1, **TOLD)).gpu
    waiting = "waiting up to 1 min for nodes: device cuda: 2 workers need a GPU each, the cluster has 0\n"
    assert capsys.readouterr().out == waiting


def test_a_search_waits_for_nodes_too(empty, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("RAY_enable_autoscaler_v2")
    monkeypatch.setattr(room, "NODES_SECONDS", 0.01)
    cpus = chain([0.0], repeat(4.0))
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": next(cpus)}}])
    plan = search(tmp_path, {}, cpus_per_worker=2, wait_minutes=1)
    assert awaited_capacity(plan).trials == 2
    said = "cpus_per_worker 2: a trial of 1 workers does not fit the cluster's 0 CPUs\n"
    assert capsys.readouterr().out == f"waiting up to 1 min for nodes: {said}"


def test_nodes_that_do_not_come_are_not_waited_for_any_longer(empty, monkeypatch):
    monkeypatch.delenv("RAY_enable_autoscaler_v2")
    monkeypatch.setattr(room, "NODES_SECONDS", 0.01)
    with pytest.raises(UserError, match="2 workers need a GPU each, the cluster has 0"):
        launch.awaited_resources(small_config(num_workers=2, wait_minutes=0.001, **TOLD))
