"""The manifests' own command lines on a real Ray, submitted as KubeRay does, evicted, retried, and watched.

One head without CPUs and one worker, token authentication, the settings mounted in a folder; a model that is small.
"""

import json
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.cluster.small import SMALL
from tests.k8s.local_ray import LocalRay, free_ports
from tests.k8s.rendered import check, documents, find, needs_kubectl
from tests.k8s.test_monitoring import ALERTS, DASHBOARDS, RULES, metric_names, queries

pytestmark = needs_kubectl
DEADLINE_SECONDS = 480
# As many epochs as no machine does while its pods are being evicted.
QUICK = {
    "train.yaml": {"epochs": 160, "batch_size": 64, "cpus_per_worker": 1, "checkpoint_every": 1000},
    "tune.yaml": {"epochs": 2, "batch_size": 64, "cpus_per_worker": 1},
}
GPU_ALONE = {"ray_crystalformer_gpu_memory_bytes"}
DIVERGED_ALONE = {"ray_crystalformer_divergences_total"}
KUBELET = {"kubelet_volume_stats_available_bytes", "kubelet_volume_stats_capacity_bytes"}


class Jobs:
    """RayJobs of the overlay for a laptop, on a local Ray."""

    def __init__(self, ray: LocalRay, folder: Path) -> None:
        """``folder`` is where the pods' volumes are."""
        self.ray, self._folder = ray, folder
        self._objects = documents("cpu-kind")
        self._mount()

    def _mount(self) -> None:
        """The ConfigMap's files as the kubelet lays them down, with their paths and made quick."""
        job = find(self._objects, "RayJob", instance="train")
        pod = check.ray_cluster(job)["headGroupSpec"]["template"]["spec"]
        mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        (name,) = (volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume)
        (config,) = (item for item in self._objects if item["metadata"]["name"] == name)
        for path in mounts.values():
            self.place(path).mkdir(parents=True, exist_ok=True)
        for file, text in config["data"].items():
            if file.endswith(".yaml"):
                settings = yaml.safe_load(text)
                for key in ("data_dir", "storage_path"):
                    settings[key] = str(self.place(settings[key]))
                text = yaml.safe_dump(settings | SMALL | QUICK[file])
            (self.place(mounts["config"]) / file).write_text(text)

    def place(self, path: str) -> Path:
        """Where a path of the pods is here."""
        return self._folder / path.lstrip("/")

    def hook(self, instance: str, part: str) -> list[str]:
        """The preStop command of the head or of a worker."""
        group = check.ray_cluster(find(self._objects, "RayJob", instance=instance))[part]
        group = group[0] if isinstance(group, list) else group
        hook = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        return [*hook[:-1], str(self.place(hook[-1]))]

    def submit(self, instance: str, name: str) -> None:
        """Submit as KubeRay's submitter does: the entrypoint goes into a shell as it is."""
        entrypoint = find(self._objects, "RayJob", instance=instance)["spec"]["entrypoint"]
        entrypoint = entrypoint.replace("/etc/crystalformer", str(self.place("/etc/crystalformer")))
        if instance == "tune":
            # Two trials that cost the same; the paper's own space has settings whose neighbours take minutes to find.
            space = self.place("/etc/crystalformer/space.yaml")
            space.write_text("lr: {log: [0.0003, 0.003]}\n")
            entrypoint = entrypoint.replace("--num_trials 10", f"--num_trials 2 --space {space}")
        line = f"ray job submit --address {self.ray.dashboard} --submission-id {name} --no-wait -- {entrypoint} ;"
        self.ray.run(["/bin/bash", "-ce", line], until=20)

    def info(self, name: str) -> dict:
        """What the operator asks the dashboard for."""
        return self.ray.ask(f"api/jobs/{name}")

    def log(self, name: str) -> str:
        """The job's output so far."""
        return self.ray.run(["ray", "job", "logs", "--address", self.ray.dashboard, name])

    def wait(self, name: str) -> dict:
        """The job's state when it has ended."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (info := self.info(name))["status"] in ("PENDING", "RUNNING"):
            assert time.monotonic() < deadline, self.log(name)
            time.sleep(0.5)
        return info


class Prometheus:
    """A real one that scrapes both nodes every second, with the labels that the PodMonitors give."""

    def __init__(self, ray: LocalRay, folder: Path) -> None:
        """``folder`` is for its data."""
        (port,) = free_ports(1)
        self._url = f"http://127.0.0.1:{port}"
        (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
        targets = [
            {
                "targets": [f"{ray.node_address}:{port}"],
                "labels": {
                    "ray_io_node_type": kind,
                    "ray_io_cluster": "shear-1-x",
                    "namespace": "crystalformer",
                    "endpoint": "metrics",
                    "app_kubernetes_io_instance": "train",
                    "pod": kind,
                },
            }
            for kind, port in (("head", ray.head_metrics), ("worker", ray.worker_metrics))
        ]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "ray", "static_configs": targets}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        options = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log
            )

    def get(self, path: str, **query: str) -> dict:
        """The data of an answer."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def seen(self, expression: str) -> list:
        """What a panel would have shown since the start."""
        for variable, value in (("$run", ".*"), ("$cluster", ".*"), ("$__rate_interval", "1m")):
            expression = expression.replace(variable, value)
        now = time.time()
        span = {"start": str(now - 2 * DEADLINE_SECONDS), "end": str(now), "step": "1"}
        return self.get("query_range", query=expression, **span)["result"]

    def close(self) -> None:
        """End it."""
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)


@pytest.fixture(scope="module")
def ray():
    """The cluster."""
    ray = LocalRay()
    yield ray
    ray.close()


@pytest.fixture(scope="module")
def prometheus(ray, tmp_path_factory):
    """A Prometheus that watches from the start; None where there is none."""
    if shutil.which("prometheus") is None:
        yield None
        return
    prometheus = Prometheus(ray, tmp_path_factory.mktemp("prometheus"))
    yield prometheus
    prometheus.close()


@pytest.fixture(scope="module")
def jobs(ray, prometheus, tmp_path_factory):
    """The train RayJob under way."""
    jobs = Jobs(ray, tmp_path_factory.mktemp("pods"))
    jobs.submit("train", "train-1")
    return jobs


def wait_until_under_way(jobs: Jobs) -> None:
    """Until the run has had an epoch."""
    deadline, rows = time.monotonic() + DEADLINE_SECONDS, jobs.place("/mnt/runs/shear-1/metrics.jsonl")
    while not (rows.exists() and rows.read_text()):
        assert jobs.info("train-1")["status"] in ("PENDING", "RUNNING"), jobs.log("train-1")
        assert time.monotonic() < deadline, jobs.log("train-1")
        time.sleep(0.5)


def run_hook(jobs: Jobs, part: str, *words: str) -> str:
    """A pod's preStop; its output."""
    environment = {**jobs.ray.environment, "RAY_ADDRESS": jobs.ray.address}
    done = subprocess.run([*jobs.hook("train", part), *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def checkpoints(jobs: Jobs) -> set[str]:
    return {path.name for path in jobs.place("/mnt/runs/shear-1").glob("checkpoint-*")}


def test_a_worker_that_is_evicted_leaves_a_checkpoint(jobs):
    """preStop of the worker: a checkpoint is registered, long before the time is up."""
    wait_until_under_way(jobs)
    assert checkpoints(jobs) == set(), "the next one would be due after the last epoch"
    began = time.monotonic()
    run_hook(jobs, "workerGroupSpecs", str(DEADLINE_SECONDS), jobs.ray.worker_id())
    assert time.monotonic() - began < DEADLINE_SECONDS / 4
    assert len(checkpoints(jobs)) == 1


def test_a_head_that_is_evicted_ends_its_job_with_a_checkpoint(jobs):
    """preStop of the head: SIGTERM to the driver, which exits with 143."""
    assert run_hook(jobs, "headGroupSpec", "60", "1") == ""
    info = jobs.wait("train-1")
    assert info["status"] == "FAILED", jobs.log("train-1")
    assert info["driver_exit_code"] == 128 + signal.SIGTERM, jobs.log("train-1")
    assert checkpoints(jobs)


def test_a_retry_goes_on_to_the_end_and_so_does_a_search(jobs):
    """The same entrypoint again, as KubeRay's backoffLimit repeats it, on another worker; a search beside it."""
    jobs.ray.end_worker()
    jobs.ray.start_worker()
    jobs.submit("train", "train-2")
    jobs.submit("tune", "tune-1")
    assert jobs.wait("train-2")["status"] == "SUCCEEDED", jobs.log("train-2")
    assert "resuming after step" in jobs.log("train-2")
    results = json.loads(jobs.place("/mnt/runs/shear-1/results.json").read_text())
    assert results["epochs"] == QUICK["train.yaml"]["epochs"]
    rows = jobs.place("/mnt/runs/shear-1/metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == list(range(1, results["epochs"] + 1))
    assert jobs.wait("tune-1")["status"] == "SUCCEEDED", jobs.log("tune-1")
    best = yaml.safe_load(jobs.place("/mnt/runs/shear-search-1/best.yaml").read_text())
    assert best["target"] in ("shear", ["shear"])
    trials = jobs.place("/mnt/runs/shear-search-1/trials.csv").read_text().splitlines()
    assert len(trials) == 1 + 2


def test_prometheus_had_what_alerts_and_dashboards_ask_for(jobs, prometheus):
    if prometheus is None:
        pytest.skip("needs Prometheus (Debian's package prometheus)")
    expressions = [q for path in DASHBOARDS for q in queries(path)]
    alerts = [rule["expr"] for rule in ALERTS.values()]
    named = {name for text in expressions + alerts for name in metric_names(text)}
    assert named - set(prometheus.get("label/__name__/values")) == GPU_ALONE | DIVERGED_ALONE | KUBELET
    assert [q for q in expressions if not metric_names(q) & GPU_ALONE and not prometheus.seen(q)] == []
    runs = {row["metric"]["run"] for row in prometheus.seen("ray_crystalformer_validation_mae")}
    assert "shear-1" in runs
    assert len(runs) >= 2, "a trial's, too"
    starts = prometheus.seen(
        f"max_over_time(({ALERTS['CrystalformerWorkerRestarts']['expr'].rpartition(' > ')[0]})[1h:1s])"
    )
    counted = [float(value) for row in starts if row["metric"]["run"] == "shear-1" for _, value in row["values"]]
    assert max(counted) >= 2, "both tries"
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules} == set(ALERTS)
    assert [rule for rule in rules if rule["health"] != "ok"] == []
    fired = {row["metric"]["alertname"] for row in prometheus.seen('ALERTS{alertstate="firing"}')}
    assert fired <= {"RayDiskNearlyFull", "RayMemoryNearlyFull"}, "this machine's own state"
