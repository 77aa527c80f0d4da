"""Alerts and dashboards, as far as they show without a live run (test_live.py has one)."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from cluster.worker import metrics
from tests.k8s.rendered import REPOSITORY, documents, needs_kubectl

MONITORING = REPOSITORY / "k8s" / "components" / "monitoring"
UNIT_TESTS = REPOSITORY / "tests" / "k8s" / "rules_test.yaml"
DASHBOARDS = sorted(MONITORING.glob("dashboards/*.json"))
RULES = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian's package prometheus)"
)


def queries(dashboard) -> list[str]:
    """The expressions of a dashboard's panels."""
    panels = json.loads(dashboard.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression speaks of; labels such as ray_io_cluster are none."""
    names = re.findall(r"\b(?:(?:ray|kubelet)_[a-z0-9_]+|up)\b", expression)
    return {name for name in names if not name.startswith("ray_io_")}


def ours() -> set[str]:
    """The names that cluster/worker/metrics.py defines, as Prometheus sees them."""
    gauges = [name for name, _ in metrics._GAUGES.values()]
    gauges += [metrics.VALIDATION[0], metrics.STEP_SECONDS[0], metrics.GPU_MEMORY[0]]
    counters = [metrics.STARTS[0], metrics.DIVERGENCES[0]]
    return {f"ray_{name}" for name in gauges} | {f"ray_{name}_total" for name in counters}


@needs_promtool
def test_the_alerts_come_when_they_have_to(tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    shutil.copy(UNIT_TESTS, tmp_path)
    for words in (["check", "rules", "rules.yaml"], ["test", "rules", UNIT_TESTS.name]):
        done = subprocess.run(["promtool", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_promtool_sees_a_wrong_alert(tmp_path):
    """The unit tests bite: without its ``for`` or with another threshold an alert fails them."""
    shutil.copy(UNIT_TESTS, tmp_path)
    for old, new in (
        ("> 90", "> 80"),
        ("offset 15m", "offset 1m"),
        ("offset 1h", "offset 3h"),
        ('namespace="crystalformer"', 'namespace=~".+"'),
    ):
        changed = yaml.safe_dump(RULES, width=1000).replace(old, new)
        assert new in changed
        (tmp_path / "rules.yaml").write_text(changed)
        done = subprocess.run(
            ["promtool", "test", "rules", UNIT_TESTS.name], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 1, new


def test_every_alert_is_tested_both_ways():
    cases = [c for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for c in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == set(ALERTS)
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == set(ALERTS)


def test_alerts_and_dashboards_name_metrics_that_we_define():
    expressions = [rule["expr"] for rule in ALERTS.values()] + [q for path in DASHBOARDS for q in queries(path)]
    used = {name for text in expressions for name in metric_names(text) if name.startswith("ray_crystalformer_")}
    assert used <= ours()
    assert used >= {"ray_crystalformer_step", "ray_crystalformer_train_loss", "ray_crystalformer_validation_mae"}


@needs_kubectl
def test_the_alerts_are_of_the_namespace_that_they_are_applied_to():
    """Each metric of them: Prometheus sees those of all namespaces."""
    (rules,) = (item for item in documents("gpu") if item["kind"] == "PrometheusRule")
    named = f'{{namespace="{rules["metadata"]["namespace"]}"'
    for rule in (rule for group in rules["spec"]["groups"] for rule in group["rules"]):
        behind = re.split(r"\b(?:(?:ray|kubelet)_(?!io_)[a-z0-9_]+|up)\b", rule["expr"])[1:]
        assert behind
        assert all(text.startswith(named) for text in behind), rule["expr"]


def test_the_dashboards_are_whole():
    assert [path.stem for path in DASHBOARDS] == ["training", "tuning"]
    for path in DASHBOARDS:
        board = json.loads(path.read_text())
        variables = {variable["name"] for variable in board["templating"]["list"]}
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
        assert len(set(places)) == len(places)
        assert len({panel["id"] for panel in board["panels"]}) == len(places)
        for panel in board["panels"]:
            assert panel["title"] and panel["targets"]
            for target in panel["targets"]:
                assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}


@needs_kubectl
def test_grafana_and_prometheus_find_them():
    objects = documents("gpu")
    boards = [item for item in objects if (item["metadata"].get("labels") or {}).get("grafana_dashboard") == "1"]
    assert sorted(name for board in boards for name in board["data"]) == ["training.json", "tuning.json"]
    monitors = {item["metadata"]["name"]: item for item in objects if item["kind"] == "PodMonitor"}
    ports = {entry["port"] for item in monitors.values() for entry in item["spec"]["podMetricsEndpoints"]}
    (job,) = (item for item in objects if item["metadata"]["name"] == "shear-1")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert ports <= {port["name"] for port in head["ports"]}
    numbers = {port["containerPort"] for port in head["ports"] if port["name"] in ports}
    (policy,) = (
        item for item in objects if item["kind"] == "NetworkPolicy" and item["metadata"]["name"] == "metrics"
    )
    assert {entry["port"] for entry in policy["spec"]["ingress"][0]["ports"]} == numbers
