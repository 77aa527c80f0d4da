"""A live run is scraped from Ray's metrics endpoint and read with Prometheus's own parser."""

import threading
import time
import urllib.request

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

import cluster  # noqa: F401 - sets Ray's environment before Ray is imported
from cluster.metrics import _GAUGES, STARTS, STEP_SECONDS, VALIDATION
from cluster.trainer import train
from tests.cluster.small import small_config

DEADLINE_SECONDS = 120


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


def test_a_live_run_is_scraped(endpoint, tmp_path, data_dir):
    config = small_config(
        target="shear",
        dataset="elastic_tensor_2015",
        data_dir=str(data_dir),
        storage_path=str(tmp_path),
        run_name="live",
        epochs=400,
        batch_size=64,
        threads_per_worker=1,
        cpus_per_worker=1,
    )
    failure: list[BaseException] = []
    thread = threading.Thread(target=_train, args=(config, failure), daemon=True)
    thread.start()
    wanted = {name for name, _ in (*_GAUGES.values(), VALIDATION, STEP_SECONDS)} | {STARTS[0] + "_total"}
    deadline, found = time.monotonic() + DEADLINE_SECONDS, {}
    while not wanted <= set(found) and time.monotonic() < deadline and thread.is_alive():
        time.sleep(0.5)
        found = scrape(endpoint)
    assert not failure, failure
    assert wanted <= set(found), wanted - set(found)
    for samples in found.values():
        for sample in samples:
            assert (sample.labels["run"], sample.labels["targets"], sample.labels["rank"]) == ("live", "shear", "0")
    (validation,) = found[VALIDATION[0]]
    assert validation.labels["target"] == "shear"
    assert 0.0 < validation.value < 1.0
    assert found["crystalformer_step"][0].value >= found["crystalformer_epoch"][0].value >= 1
    assert found[STARTS[0] + "_total"][0].value == 1


def _train(config, failure):
    try:
        train(config)
    except ray.exceptions.RayError:
        return  # the test is over and Ray was shut down under the run
    except BaseException as error:  # noqa: BLE001 - shown by the test
        failure.append(error)
