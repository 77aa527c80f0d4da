"""Runs that the cluster has no room for, or not yet: one line says so, and one signal ends them."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table

import cluster  # noqa: F401 - sets Ray's environment
from cluster.driver.actors import actors_of
from cluster.driver.fit import Fit
from cluster.driver.waiting import AGAIN_SECONDS, FIRST_SECONDS, Waiting
from cluster.settings.workers import WorkerRange
from tests.cluster.runs import TIMEOUT, Run

END_SECONDS = 20.0
"""For a run to end, Ray's connection with it: one that goes on for a step takes longer on a busy cluster."""


@pytest.fixture(scope="module")
def busy(tmp_path_factory):
    """A Ray node of 2 CPUs, this process connected to it, and an actor that holds both; gives address and actor."""
    ray_command = str(Path(sys.executable).parent / "ray")
    subprocess.run([ray_command, "get-auth-token", "--generate"], check=True, capture_output=True)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    holder = ray.remote(num_cpus=2)(Holder).remote()
    ray.get(holder.there.remote())
    yield made.address, holder
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def free(busy):
    """The address of that cluster, with both CPUs free."""
    ray.kill(busy[1])
    return busy[0]


class Holder:
    """Another one's work."""

    def there(self) -> bool:
        return True


def wait_for_actor(name: str) -> None:
    """Until some job of the cluster has an actor of this class."""
    deadline = time.monotonic() + TIMEOUT
    while not any(
        actor["ActorClassName"].endswith(name) and actor["State"] == "ALIVE" for actor in actors().values()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def read_until(run: Run, pattern: str) -> str:
    """What the run prints, up to the first line that has the pattern."""
    lines, deadline = [], time.monotonic() + TIMEOUT
    for line in run.process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
        assert time.monotonic() < deadline
    raise AssertionError(f"{pattern} is not in {''.join(lines)}")


def ended(run: Run, number: int) -> str:
    """Send the signal and wait; what was printed after it. The run may not take long."""
    start = time.monotonic()
    run.process.send_signal(number)
    text = run.end()
    assert run.process.returncode == 128 + number, text
    assert time.monotonic() - start < END_SECONDS
    assert "a checkpoint is written" not in text
    return text


def test_a_reservation_that_no_node_can_hold_is_refused(busy, tmp_path):
    run = Run(tmp_path, "large", busy[0], cpus_per_worker=64_000)
    text = run.end()
    assert run.process.returncode == 2, text
    assert re.search(
        r"^error: cpus_per_worker 64000: there is room for 0 of 1 workers of 64000 CPUs each on the cluster's "
        r"1 node of 2 CPUs( and \d+ GPUs?)?$",
        text.splitlines()[-1],
    )
    assert "waiting" not in text


def test_runs_that_wait_say_so_end_on_one_signal_and_train_once_there_is_room(busy, tmp_path):
    """Three at once, since each waits before it says so: two end while they wait, the third gets its room."""
    address, holder = busy
    settings = {"num_workers": 2, "cpus_per_worker": 1, "epochs": 2}
    terminated, interrupted, patient = (Run(tmp_path, name, address, **settings) for name in ("term", "int", "run"))
    for run in (terminated, interrupted, patient):
        said = read_until(run, "waiting for")
        assert said.splitlines()[-1] == "waiting for 2 workers x 1 CPU: 0 of 2 CPUs free"
    for run, number in ((terminated, signal.SIGTERM), (interrupted, signal.SIGINT)):
        assert ended(run, number).splitlines()[-1] == (
            f"stopped while no worker was at work; go on with the same command and --run_name {run.folder.name} "
            "--resume"
        )

    taken = ray.remote(num_cpus=1)(Holder).remote()  # waits for the holder's end
    ray.kill(holder)
    ray.get(taken.there.remote())
    wait_for_actor("TrainController")  # tables are shared, and half of the workers have their place
    ended(patient, signal.SIGTERM)
    ray.kill(taken)
    again = Run(tmp_path, "run", address, **settings, resume=True)
    text = again.end()
    assert again.process.returncode == 0, text
    assert "waiting for" not in text  # nothing of the three is taken any more


def test_a_run_waits_for_an_autoscaler_and_says_so_at_once(free, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_enable_autoscaler_v2", "true")
    run = Run(tmp_path, "scaled", free, cpus_per_worker=64, device="cpu")
    line = read_until(run, "waiting for").splitlines()[-1]
    assert re.fullmatch(r"waiting for 1 worker x 64 CPUs: \d of 2 CPUs free; the autoscaler is to add nodes", line)
    ended(run, signal.SIGTERM)


def test_a_signal_while_the_workers_start_ends_the_run(free, tmp_path):
    run = Run(tmp_path, "early", free, num_workers=2, cpus_per_worker=1)
    wait_for_actor("TrainController")
    text = ended(run, signal.SIGINT)
    assert "waiting for" not in text


@ray.remote(num_cpus=0)
class TrainController:
    """Reserves all of the cluster, again and again: where it is killed at any time, it is at that."""

    def run(self) -> None:
        while True:
            placement_group([{"CPU": 1}] * 2)


class Reserving:
    """A trainer that has its controller reserve."""

    def fit(self) -> None:
        ray.get(TrainController.remote().run.remote())


def groups(*states: str) -> int:
    return sum(group["state"] in states for group in placement_group_table().values())


def test_what_a_controller_reserves_while_it_is_killed_is_given_back(free):
    for _ in range(3):
        fit, before = Fit(Reserving, with_tasks=False), len(placement_group_table())
        while len(placement_group_table()) < before + 20:
            assert fit.under_way(0.1)
        [controller] = actors_of("TrainController")
        resumed = held_up(psutil.Process(controller["Pid"]))
        fit.end()
        assert resumed.is_set()
        eventually(lambda: not groups("PENDING", "PREPARED", "CREATED", "RESCHEDULING"))
    eventually(lambda: ray.available_resources().get("CPU") == 2.0)


def held_up(process: psutil.Process) -> threading.Event:
    """Suspend it for half a second: as on a busy machine, Ray books it as dead a while before it is."""
    resumed = threading.Event()

    def resume() -> None:
        resumed.set()
        process.resume()

    process.suspend()
    threading.Timer(0.5, resume).start()
    return resumed


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + END_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_line_comes_again_every_few_minutes(busy):
    now, lines = [0.0], []
    waiting = Waiting(WorkerRange(1, 3), {"CPU": 1.0}, lambda line: lines.append((now[0], line)), lambda: now[0])
    seconds = FIRST_SECONDS + 2 * AGAIN_SECONDS + 10
    while now[0] < seconds:
        waiting.look()
        assert waiting.told == bool(lines)
        now[0] += 1
    assert [at for at, _ in lines] == [20.0, 320.0, 620.0]
    assert all(line.startswith("waiting for 1-3 workers x 1 CPU: ") for _, line in lines)
