"""Every overlay renders and is good, and what is made wrong is caught."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.k8s.rendered import OVERLAYS, REPOSITORY, check, documents, find, find_named, needs_kubectl, pod, text

pytestmark = needs_kubectl
SCHEMAS = os.environ.get("KUBERAY_SCHEMAS")
needs_schemas = pytest.mark.skipif(SCHEMAS is None, reason="needs Ray's CRDs: KUBERAY_SCHEMAS names no folder")


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


def small_shm(objects):
    for volume in pod(objects)["volumes"]:
        if volume["name"] == "shm":
            volume["emptyDir"]["sizeLimit"] = "8Gi"


def large_store(objects):
    group = check.ray_cluster(find(objects, "RayCluster", instance="cluster"))["workerGroupSpecs"][0]
    group["rayStartParams"]["object-store-memory"] = str(13 * 2**30)


def no_shm(objects):
    mounts = pod(objects, "headGroupSpec", instance="tune")["containers"][0]["volumeMounts"]
    mounts[:] = [mount for mount in mounts if mount["name"] != "shm"]


def all_shm(objects):
    for volume in pod(objects)["volumes"]:
        if volume["name"] == "shm":
            volume["emptyDir"]["sizeLimit"] = "48Gi"


def head_service_without_a_pod(objects):
    job = find(objects, "RayJob", instance="train")["spec"]["rayClusterSpec"]
    job["headGroupSpec"]["template"]["metadata"]["labels"]["app.kubernetes.io/name"] = "crystalformer"


def no_home(objects):
    environment = pod(objects)["containers"][0]["env"]
    environment[:] = [entry for entry in environment if entry["name"] != "CRYSTALFORMER_HOME"]


def claim_elsewhere(objects):
    for mount in pod(objects, "headGroupSpec", "RayCluster", "cluster")["containers"][0]["volumeMounts"]:
        if mount["name"] == "runs":
            mount["mountPath"] = "/runs"


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
    small_shm: "workers: an object store of 10000000000 bytes does not fit in /dev/shm, which has 8589934592",
    large_store: "workers: an object store of 13958643712 bytes does not fit",
    no_shm: "head: /dev/shm is no volume in memory",
    all_shm: "workers: /dev/shm, which counts as the pod's memory",
    head_service_without_a_pod: "head: the label app.kubernetes.io/name is KubeRay's",
    no_home: "workers: CRYSTALFORMER_HOME is None",
    claim_elsewhere: "head: CRYSTALFORMER_HOME is /mnt: the default folder 'runs'",
    capital: "'Shear-1' cannot be the name of a run",
    underscore: "'shear_search' cannot be the name of a run",
    digit_first: "'2nd-search' cannot be the name of a run",
    too_long: "at most 47",
}
"""What no schema and no operator forbids."""


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


@pytest.mark.parametrize(
    ("memory", "shm"), [(4, 1), (4, 2), (16, 12), (32, 8), (32, 12), (48, 12), (48, 64), (2048, 1024)]
)
def test_the_object_store_is_as_large_as_ray_makes_it(memory, shm, monkeypatch):
    from ray._private import utils

    monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda: shm * 2**30)
    assert check.object_store(memory * 2**30, shm * 2**30) == utils.resolve_object_store_memory(memory * 2**30)


def test_an_image_may_be_pinned_by_its_digest_instead():
    objects = documents("gpu")
    for document in objects:
        for _, template in check._templates(document):
            for container in template["spec"]["containers"]:
                container["image"] = "registry.example.com:5000/crystalformer@sha256:" + "ab" * 32
    assert check.check(objects) == []


def test_a_name_may_have_47_characters():
    objects = documents("gpu")
    find(objects, "RayJob", instance="train")["metadata"]["name"] = "a-" + "b" * 44 + "7"
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


def test_make_manifests_renders_and_validates():
    built = REPOSITORY / "build"
    done = subprocess.run(["make", "-C", str(REPOSITORY), "manifests"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in built.glob("*.yaml")} >= {f"{name}.yaml" for name in OVERLAYS}
    for name in OVERLAYS:
        assert f"build/{name}.yaml: " in done.stdout


def test_the_ignored_folder_is_not_committed():
    assert "build/" in Path(REPOSITORY / ".gitignore").read_text().splitlines()
