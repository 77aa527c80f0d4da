"""Every overlay renders and is good, every setting goes where it belongs, and what is made wrong is caught."""

import http.server
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from cluster.config import TrainConfig, load_flat
from tests.k8s.rendered import OVERLAYS, REPOSITORY, check, documents, find, needs_kubectl, text

pytestmark = needs_kubectl
README = (REPOSITORY / "k8s" / "README.md").read_text(encoding="utf-8")
SCHEMAS = os.environ.get("KUBERAY_SCHEMAS")
needs_schemas = pytest.mark.skipif(SCHEMAS is None, reason="needs Ray's CRDs: KUBERAY_SCHEMAS names no folder")
GPU_OVERLAYS = [name for name in OVERLAYS if name.startswith("gpu")]


def test_there_is_an_overlay_for_gpus_and_one_for_a_laptop():
    assert {"gpu", "cpu-kind"} <= set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_good(overlay):
    assert check.check(documents(overlay)) == []


@needs_schemas
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_what_the_crds_allow(overlay, tmp_path):
    path = tmp_path / "rendered.yaml"
    path.write_text(text(overlay))
    done = check.validator(SCHEMAS, path)
    assert done.returncode == 0, done.stdout
    assert re.search(r"^\d+ passed, 0 failed$", done.stdout, re.MULTILINE)


def pod(objects, part="workerGroupSpecs", kind="RayJob", instance="train"):
    cluster = check.ray_cluster(find(objects, kind, instance=instance))
    group = cluster[part][0] if part == "workerGroupSpecs" else cluster[part]
    return group["template"]["spec"]


def unknown_field(objects):
    pod(objects)["containers"][0]["securitycontext"] = {}


def unknown_field_of_a_policy(objects):
    find_named(objects, "NetworkPolicy", "dns")["spec"]["egres"] = []


def another_ray(objects):
    find(objects, "RayJob", instance="tune")["spec"]["rayClusterSpec"]["rayVersion"] = "2.59.0"


def another_ray_in_the_image(objects):
    for part in ("headGroupSpec", "workerGroupSpecs"):
        container = pod(objects, part, "RayCluster", "cluster")["containers"][0]
        container["image"] = container["image"].replace(check.pinned_ray(), "2.59.0")


def latest(objects):
    container = pod(objects)["containers"][0]
    container["image"] = container["image"].rpartition(":")[0] + ":latest"


def privileged(objects):
    del pod(objects, "headGroupSpec")["containers"][0]["securityContext"]["allowPrivilegeEscalation"]


def writable_root(objects):
    pod(objects, "headGroupSpec")["containers"][0]["securityContext"]["readOnlyRootFilesystem"] = False


def submitter_without_hardening(objects):
    job = find(objects, "RayJob", instance="train")["spec"]
    del job["submitterPodTemplate"]["spec"]["containers"][0]["securityContext"]


def dangling_config(objects):
    for volume in pod(objects)["volumes"]:
        if "configMap" in volume:
            volume["configMap"]["name"] = "config"


def dangling_claim(objects):
    for volume in pod(objects, "headGroupSpec")["volumes"]:
        if volume["name"] == "runs":
            volume["persistentVolumeClaim"]["claimName"] = "results"


def dangling_account(objects):
    pod(objects)["serviceAccountName"] = "rays"


def dangling_volume(objects):
    pod(objects)["volumes"].pop()


def open_api(objects):
    del find(objects, "RayCluster", instance="cluster")["spec"]["authOptions"]


def fewer_workers(objects):
    group = find(objects, "RayJob", instance="train")["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    group["replicas"] = group["minReplicas"] = group["maxReplicas"] = 7


def suspended(objects):
    find(objects, "RayJob", instance="train")["spec"]["suspend"] = True


def unset(objects):
    job = find(objects, "RayJob", instance="tune")["spec"]
    job["entrypoint"] = job["entrypoint"].replace("--target shear", "--target SETTING")


def patient(objects):
    del pod(objects, "headGroupSpec", "RayCluster", "cluster")["tolerations"]


def patient_worker(objects):
    for toleration in pod(objects, instance="tune")["tolerations"]:
        toleration["tolerationSeconds"] = 300


def patient_submitter(objects):
    job = find(objects, "RayJob", instance="tune")["spec"]
    del job["submitterPodTemplate"]["spec"]["containers"][0]["livenessProbe"]


def no_disk(objects):
    del pod(objects, instance="tune")["containers"][0]["env"][-1]


def capital(objects):
    find(objects, "RayJob", instance="train")["metadata"]["name"] = "Shear-1"


def underscore(objects):
    find(objects, "RayJob", instance="tune")["metadata"]["name"] = "shear_search"


def digit_first(objects):
    find(objects, "RayJob", instance="tune")["metadata"]["name"] = "2nd-search"


def too_long(objects):
    find(objects, "RayJob", instance="train")["metadata"]["name"] = "a" * 48


MUTATIONS = {
    unknown_field: "securitycontext",
    unknown_field_of_a_policy: "egres",
    another_ray: "rayVersion",
    another_ray_in_the_image: "2.59.0",
    latest: "pinned",
    privileged: "allowPrivilegeEscalation",
    writable_root: "readOnlyRootFilesystem",
    submitter_without_hardening: "allowPrivilegeEscalation",
    dangling_config: "'config'",
    dangling_claim: "'results'",
    dangling_account: "'rays'",
    dangling_volume: "volume",
    open_api: "authOptions",
}
OWN_RULES = {
    fewer_workers: "--num_workers",
    unset: "SETTING",
    suspended: "suspend is set",
    patient: "head: no toleration of node.kubernetes.io/unreachable",
    patient_worker: "workers: no toleration of node.kubernetes.io/not-ready",
    patient_submitter: "submitter has no livenessProbe",
    no_disk: "workers: RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE",
    capital: "'Shear-1' cannot be the name of a run",
    underscore: "'shear_search' cannot be the name of a run",
    digit_first: "'2nd-search' cannot be the name of a run",
    too_long: "at most 47",
}
"""What no schema and no operator forbids."""


def find_named(objects, kind, name):
    (found,) = (item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return found


@pytest.mark.parametrize("overlay", ["cpu-kind", "gpu"])
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_what_is_made_wrong_is_caught(overlay, mutate):
    objects = documents(overlay)
    mutate(objects)
    findings = check.check(objects)
    assert findings
    assert any(MUTATIONS[mutate] in finding for finding in findings), findings


@pytest.mark.parametrize("mutate", OWN_RULES, ids=lambda mutate: mutate.__name__)
def test_so_is_what_no_schema_forbids(mutate):
    objects = documents("gpu")
    mutate(objects)
    findings = check.check([item for item in objects if item["kind"] in ("RayJob", "RayCluster")])
    assert any(OWN_RULES[mutate] in finding for finding in findings), findings


def test_an_image_may_be_pinned_by_its_digest_instead():
    objects = documents("gpu")
    for document in objects:
        for _, template in check._templates(document):
            for container in template["spec"]["containers"]:
                container["image"] = "registry.example.com:5000/crystalformer@sha256:" + "ab" * 32
    assert check.check(objects) == []


@needs_schemas
def test_what_is_made_wrong_is_caught_by_the_crds_too(tmp_path):
    """One file with every wrong object under a name of its own: each has to be told."""
    wrong = {}
    for mutate, word in MUTATIONS.items():
        objects = documents("gpu")
        mutate(objects)
        path = tmp_path / f"{mutate.__name__}.yaml"
        path.write_text(yaml.safe_dump_all(objects))
        wrong[mutate.__name__] = (path, word)
    running = {name: check.validator(SCHEMAS, path) for name, (path, _) in wrong.items()}
    missed = [name for name, done in running.items() if done.returncode != 1]
    assert missed == []


@needs_schemas
def test_an_unknown_field_of_a_rayjob_is_caught(tmp_path):
    objects = documents("gpu")
    find(objects, "RayJob", instance="train")["spec"]["backofLimit"] = 3
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    assert "backofLimit" in check.validator(SCHEMAS, path).stdout


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of k8s/ where every line of the GPU overlay's settings was changed, rendered."""
    folder = tmp_path_factory.mktemp("k8s")
    shutil.copytree(REPOSITORY / "k8s", folder / "k8s")
    settings = folder / "k8s" / "overlays" / "gpu" / "settings.yaml"
    lines = settings.read_text()
    for name, value in CHANGES.items():
        lines, count = re.subn(rf"^(  {name}: *)\S+", rf"\g<1>{value}", lines, flags=re.MULTILINE)
        assert count == 1, name
    settings.write_text(lines)
    image = folder / "k8s" / "overlays" / "gpu" / "kustomization.yaml"
    image.write_text(image.read_text().replace("registry.example.com/", "mine.example.org:5000/"))
    return list(yaml.safe_load_all(check.render(settings.parent)))


CHANGES = {
    "run": "band-7",
    "study": "band-search",
    "target": "bandgap",
    "dataset": "dielectric_2017",
    "workers": '"5"',
    "trials": '"77"',
    "trials-at-once": '"6"',
    "gpu": "NVIDIA-H100-80GB-HBM3",
    "storage-class": "cephfs",
    "api-server": "10.1.2.3/32",
}


def test_every_setting_is_one_line(changed):
    kept = yaml.safe_load((REPOSITORY / "k8s/overlays/gpu/settings.yaml").read_text())["data"]
    assert set(kept) == set(CHANGES)
    train, tune = (find(changed, "RayJob", instance=name) for name in ("train", "tune"))
    assert (train["metadata"]["name"], tune["metadata"]["name"]) == ("band-7", "band-search")
    assert options(train) == {
        "config": "/etc/crystalformer/train.yaml",
        "target": "bandgap",
        "dataset": "dielectric_2017",
        "num_workers": "5",
        "run_name": "band-7",
        "auto_resume": None,
    }
    assert options(tune) | {"auto_resume": None} == {
        "config": "/etc/crystalformer/tune.yaml",
        "target": "bandgap",
        "dataset": "dielectric_2017",
        "concurrent": "6",
        "num_trials": "77",
        "run_name": "band-search",
        "auto_resume": None,
    }
    group = train["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [5, 5, 5]
    group = tune["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert [group[name] for name in ("replicas", "minReplicas", "maxReplicas")] == [0, 0, 6]
    for document in changed:
        if document["kind"] == "PersistentVolumeClaim":
            assert document["spec"]["storageClassName"] == "cephfs"
        if check.ray_cluster(document):
            worker = check.ray_cluster(document)["workerGroupSpecs"][0]["template"]["spec"]
            assert worker["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
            assert worker["containers"][0]["image"].startswith("mine.example.org:5000/crystalformer:")
    (block,) = find_named(changed, "NetworkPolicy", "api-server")["spec"]["egress"][0]["to"]
    assert block == {"ipBlock": {"cidr": "10.1.2.3/32"}}
    assert check.check(changed) == [], "workers and pods agree after a change of one line"


def options(job) -> dict:
    """The options of a RayJob's entrypoint, which has plain words alone: KubeRay puts it into a shell unquoted."""
    entrypoint = job["spec"]["entrypoint"]
    words = shlex.split(entrypoint)
    assert words == entrypoint.split()
    assert not re.search(r"[;&|$`<>(){}*?~!#\\\"']", entrypoint)
    assert words[0] == "crystalformer"
    found, name = {}, None
    for word in words[2:]:
        if word.startswith("--"):
            name = word.removeprefix("--")
            found[name] = None
        else:
            found[name] = word
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("instance", ["train", "tune"])
def test_the_mounted_settings_are_understood(overlay, instance, tmp_path):
    objects = documents(overlay)
    job = find(objects, "RayJob", instance=instance)
    given = options(job)
    volumes = pod(objects, "headGroupSpec", instance=instance)["volumes"]
    (name,) = (volume["configMap"]["name"] for volume in volumes if "configMap" in volume)
    data = find_named(objects, "ConfigMap", name)["data"]
    mounts = {m["name"]: m["mountPath"] for m in pod(objects, instance=instance)["containers"][0]["volumeMounts"]}
    folder, _, file = given["config"].rpartition("/")
    assert folder == mounts["config"]
    path = tmp_path / file
    path.write_text(data[file])
    settings = load_flat(path)
    assert (settings["data_dir"], settings["storage_path"]) == (mounts["data"], mounts["runs"])
    config = TrainConfig.from_flat({**settings, "target": given["target"], "run_name": given["run_name"]})
    worker = pod(objects, instance=instance)["containers"][0]["resources"]["limits"]
    assert config.scale.cpus_per_worker <= float(worker["cpu"])
    assert ("nvidia.com/gpu" in worker) == (config.scale.device == "cuda")
    for hook in ("stop.sh", "drain.sh"):
        assert data[hook] == (REPOSITORY / "k8s" / "base" / "hooks" / hook).read_text()


# Sense -------------------------------------------------------------------------------------------------------------


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
    same = {
        name: find_named(objects, "NetworkPolicy", f"ray-{name}")["spec"] for name in ("train", "tune", "cluster")
    }
    for name, spec in same.items():
        assert spec["podSelector"]["matchLabels"]["app.kubernetes.io/instance"] == name
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


def test_a_name_may_have_47_characters():
    objects = documents("gpu")
    find(objects, "RayJob", instance="train")["metadata"]["name"] = "a-" + "b" * 44 + "7"
    assert check.check(objects) == []


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


def test_make_manifests_renders_and_validates():
    built = REPOSITORY / "build"
    done = subprocess.run(["make", "-C", str(REPOSITORY), "manifests"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in built.glob("*.yaml")} >= {f"{name}.yaml" for name in OVERLAYS}
    for name in OVERLAYS:
        assert f"build/{name}.yaml: " in done.stdout


def test_the_ignored_folder_is_not_committed():
    assert "build/" in Path(REPOSITORY / ".gitignore").read_text().splitlines()
