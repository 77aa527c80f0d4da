"""A run on a Ray that was there before is scraped from its metrics endpoint and read with Prometheus's own parser."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import ray
import torch
from prometheus_client.parser import text_string_to_metric_families

import cluster  # noqa: F401 - sets Ray's environment before Ray is imported
from cluster.worker import metrics
from cluster.worker.machine import Place
from cluster.worker.metrics import _GAUGES, STARTS, STEP_SECONDS, VALIDATION, RunMetrics
from tests.cluster.small import SMALL

DEADLINE_SECONDS = 240


@pytest.fixture(scope="module")
def endpoint():
    """Where the metrics of a local Ray are, exported twice a second."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 500},
    )
    yield f"http://{ray.nodes()[0]['NodeManagerAddress']}:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


def scrape(endpoint: str) -> dict[str, list]:
    """Samples of the run, by name without Ray's prefix."""
    found: dict[str, list] = {}
    with urllib.request.urlopen(endpoint, timeout=10) as answer:
        for family in text_string_to_metric_families(answer.read().decode()):
            for sample in family.samples:
                if sample.name.startswith("ray_crystalformer_"):
                    found.setdefault(sample.name.removeprefix("ray_"), []).append(sample)
    return found


def test_a_live_run_is_scraped(endpoint, tmp_path):
    settings = {**SMALL, "epochs": 400, "batch_size": 64, "threads_per_worker": 1, "cpus_per_worker": 1}
    words = [word for key, value in settings.items() for word in (f"--{key}", *map(str, _listed(value)))]
    places = ["--run_name", "live", "--storage_path", str(tmp_path), "--data_dir", str(tmp_path / "data")]
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", "train", "--target", "shear", *words, *places],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    wanted = {name for name, _ in (*_GAUGES.values(), VALIDATION, STEP_SECONDS)} | {STARTS[0] + "_total"}
    deadline, found = time.monotonic() + DEADLINE_SECONDS, {}
    while not wanted <= set(found) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.5)
        found = scrape(endpoint)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=DEADLINE_SECONDS)[0]
    assert process.returncode == 128 + signal.SIGTERM, text
    assert wanted <= set(found), wanted - set(found)
    for samples in found.values():
        for sample in samples:
            assert (sample.labels["run"], sample.labels["targets"], sample.labels["rank"]) == ("live", "shear", "0")
    (validation,) = found[VALIDATION[0]]
    assert validation.labels["target"] == "shear"
    assert 0.0 < validation.value < 1.0
    assert found["crystalformer_step"][0].value >= found["crystalformer_epoch"][0].value >= 1
    assert found[STARTS[0] + "_total"][0].value == 1


def test_gauges_stay_while_a_step_hangs_and_go_with_the_worker(endpoint, monkeypatch):
    """Ray forgets a gauge after two exports, here a second: an alert for a hanging step would see none."""
    monkeypatch.setattr(metrics, "REPEAT_SECONDS", 0.2)
    told = RunMetrics("hangs", ("Δe",), Place(rank=0, world_size=1, device=torch.device("cpu")))

    def steps() -> list[float]:
        samples = scrape(endpoint).get("crystalformer_step", [])
        return [sample.value for sample in samples if sample.labels["run"] == "hangs"]

    def wait_until(wanted: list[float]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while steps() != wanted:
            assert time.monotonic() < deadline, f"{steps()} instead of {wanted}"
            time.sleep(0.2)

    told.row({"epoch": 1, "val_mae": {"Δe": 0.25}})  # Ray's labels take no such letter
    told.step(7, 0.1)
    try:
        wait_until([7.0])
        (error,) = [one for one in scrape(endpoint)[VALIDATION[0]] if one.labels["run"] == "hangs"]
        assert (error.value, error.labels["target"]) == (0.25, r"\u0394e")
        still = time.monotonic() + 2.0
        while time.monotonic() < still:
            assert steps() == [7.0]
            time.sleep(0.2)
    finally:
        told.close()
    wait_until([])


def _listed(value):
    return value if isinstance(value, list) else [value]
