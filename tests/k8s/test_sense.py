"""What the manifests say makes sense: GPUs, ends, closed networks, tokens, quotas, a head that knows no job."""

import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.k8s.rendered import OVERLAYS, REPOSITORY, check, documents, find, find_named, needs_kubectl, pod

pytestmark = needs_kubectl
README = (REPOSITORY / "k8s" / "README.md").read_text(encoding="utf-8")
GPU_OVERLAYS = [name for name in OVERLAYS if name.startswith("gpu")]


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_workers_have_gpus_and_heads_have_none(overlay):
    for document in documents(overlay):
        cluster = check.ray_cluster(document)
        if cluster:
            (group,) = cluster["workerGroupSpecs"]
            worker = group["template"]["spec"]
            assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
            *lost, gpu = worker["tolerations"]
            assert gpu == {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            head = cluster["headGroupSpec"]["template"]["spec"]
            assert head["tolerations"] == lost
            assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_end_after_their_hooks(overlay):
    hooks = {"headGroupSpec": ("stop.sh", 120 + 10), "workerGroupSpecs": ("drain.sh", 90)}
    for kind, instance in (("RayJob", "train"), ("RayJob", "tune"), ("RayCluster", "cluster")):
        for part, (hook, seconds) in hooks.items():
            spec = pod(documents(overlay), part, kind, instance)
            command = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
            assert command == ["/bin/bash", f"/etc/crystalformer/{hook}"]
            assert spec["terminationGracePeriodSeconds"] > seconds
            assert str(min(seconds, 120)) in (REPOSITORY / "k8s/base/hooks" / hook).read_text()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_is_closed_and_holds_no_secret(overlay):
    objects = documents(overlay)
    labels = find_named(objects, "Namespace", "crystalformer")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    assert not [item for item in objects if item["kind"] == "Secret"]
    deny = find_named(objects, "NetworkPolicy", "default-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for item in objects:
        if item["kind"] in ("Service", "Ingress"):
            assert item["spec"].get("type", "ClusterIP") == "ClusterIP"
        if item["kind"] == "NetworkPolicy":
            for rule in item["spec"].get("ingress") or []:
                assert rule.get("from"), f"{item['metadata']['name']} lets everybody in"
                assert all(peer.get("podSelector") for peer in rule["from"])


def who_reaches(objects, port: int) -> set[str]:
    """The network policies that let others than the same Ray cluster's pods in at a port of a head."""
    return {
        item["metadata"]["name"]
        for item in objects
        if item["kind"] == "NetworkPolicy"
        for rule in item["spec"].get("ingress") or []
        if any(entry["port"] == port for entry in rule.get("ports") or [])
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_operator_and_the_submitter_reach_the_dashboard(overlay):
    objects = documents(overlay)
    assert who_reaches(objects, 8265) == {"dashboard"}
    assert who_reaches(objects, 10001) == set(), "the client's port"
    (rule,) = find_named(objects, "NetworkPolicy", "dashboard")["spec"]["ingress"]
    operator, submitter = rule["from"]
    assert operator["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "kuberay-system"}
    assert submitter == {"podSelector": {"matchLabels": {"app.kubernetes.io/component": "submitter"}}}
    runs = [item["metadata"]["name"] for item in objects if item["kind"] == "RayJob"]
    own = {f"run-{run}": {"crystalformer/run": run} for run in runs}
    own["ray-cluster"] = {"app.kubernetes.io/instance": "cluster"}
    for name, labels in own.items():
        spec = find_named(objects, "NetworkPolicy", name)["spec"]
        assert spec["podSelector"] == {"matchLabels": {**labels, "ray.io/is-ray-node": "yes"}}
        assert spec["ingress"] == [{"from": [{"podSelector": spec["podSelector"]}]}]
        assert spec["egress"] == [{"to": [{"podSelector": spec["podSelector"]}]}]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_tokens_are_mounted_where_there_is_an_autoscaler_alone(overlay):
    objects = documents(overlay)
    for document in objects:
        cluster = check.ray_cluster(document)
        if cluster:
            head = cluster["headGroupSpec"]["template"]
            scaled = bool(cluster.get("enableInTreeAutoscaling"))
            assert head["spec"]["automountServiceAccountToken"] is scaled
            assert (head["metadata"]["labels"].get("crystalformer/autoscaler") == "true") is scaled
            for group in cluster["workerGroupSpecs"]:
                assert group["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_quota_holds_all_that_may_run_at_once(overlay):
    objects, used = documents(overlay), {"cpu": 0.0, "memory": 0.0, "nvidia.com/gpu": 0.0}
    for document in objects:
        cluster = check.ray_cluster(document)
        if not cluster:
            continue
        parts = [(cluster["headGroupSpec"], 1), *((g, g["maxReplicas"]) for g in cluster["workerGroupSpecs"])]
        for group, count in parts:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            for name in used:
                used[name] += count * quantity(limits.get(name, "0"))
    hard = find_named(objects, "ResourceQuota", "limits")["spec"]["hard"]
    for name, value in used.items():
        assert value <= quantity(hard[f"requests.{name}"]), name


def quantity(value: str) -> float:
    number, unit = re.fullmatch(r"([\d.]+)(m|Gi|Mi|)", str(value)).groups()
    return float(number) * {"m": 1e-3, "Gi": 2.0**30, "Mi": 2.0**20, "": 1.0}[unit]


def test_ray_tells_of_a_pods_disk_by_the_variable_that_is_set():
    agent = importlib.util.find_spec("ray.dashboard.modules.reporter.reporter_agent")
    assert 'os.environ.get("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE") == "1"' in Path(agent.origin).read_text()


@pytest.mark.parametrize(
    ("path", "token", "good"),
    [
        ("/api/jobs/shear-1-x", "Bearer secret", True),
        ("/api/jobs/another", "Bearer secret", False),
        ("/api/jobs/shear-1-x", "Bearer other", False),
    ],
    ids=["the job is known", "a new head", "another token"],
)
@pytest.mark.parametrize("instance", ["train", "tune"])
def test_a_submitter_whose_head_does_not_know_its_job_is_replaced(instance, path, token, good):
    """``ray job logs --follow`` notices neither a head that is gone without a word nor a new one."""
    (submitter,) = find(documents("gpu"), "RayJob", instance=instance)["spec"]["submitterPodTemplate"]["spec"][
        "containers"
    ]
    probe = submitter["livenessProbe"]

    class Head(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            known = (self.path, self.headers["Authorization"]) == (path, token)
            self.send_response(200 if known else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Head) as head:
        threading.Thread(target=head.serve_forever, daemon=True).start()
        # What KubeRay 1.7 gives a submitter.
        given = {
            "RAY_DASHBOARD_ADDRESS": f"127.0.0.1:{head.server_port}",
            "RAY_JOB_SUBMISSION_ID": "shear-1-x",
            "RAY_AUTH_TOKEN": "secret",
        }
        _, *words = probe["exec"]["command"]
        done = subprocess.run([sys.executable, *words], env=given, capture_output=True)
        head.shutdown()
    assert (done.returncode == 0) is good
    assert int(words[-1].rpartition("timeout=")[2].rstrip(")")) < probe["timeoutSeconds"]


def test_a_try_is_given_up_before_the_operator_gives_up_the_job():
    """Kubernetes starts the submitter anew after 10, 20, .. s, a few times; then KubeRay begins a new try."""
    told = re.findall(r"RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS.*\n?.*--set-string 'env\[0\].value=(\d+)'", README)
    assert told and len(told) == README.count("helm install kuberay-operator")
    for instance in ("train", "tune"):
        spec = find(documents("gpu"), "RayJob", instance=instance)["spec"]
        probe = spec["submitterPodTemplate"]["spec"]["containers"][0]["livenessProbe"]
        starts = 1 + spec["submitterConfig"]["backoffLimit"]
        pauses = sum(10 * 2**number for number in range(starts))
        seconds = starts * (probe["periodSeconds"] * (probe["failureThreshold"] + 1) + 30) + pauses
        assert all(seconds < int(timeout) for timeout in told)
