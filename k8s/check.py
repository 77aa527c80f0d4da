"""Renders every overlay into build/ and checks it, offline: ``make manifests``.

Kubernetes' own kinds, and the pod templates inside Ray's kinds, are checked against the schemas of Kubernetes
(PyPI's kubernetes-validate, which carries them; unknown fields are errors). What no schema holds is checked here: the
restricted pod security standard, pinned images, one Ray version, names that lead nowhere, settings that agree. Where
KUBERAY_SCHEMAS names a folder with validate.py and crds/, Ray's and the monitoring kinds are checked by that too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from ray._private import ray_constants as constants

Document = dict[str, Any]
Finding = str

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
BUILD = REPOSITORY / "build"
KUBERNETES = "1.32"
OTHER_GROUPS = {"ray.io", "monitoring.coreos.com", "kueue.x-k8s.io"}
GIVEN = {("Secret", "redis"), ("Secret", "studies")}
"""Made by hand, as they hold secrets; k8s/README.md and the component say how."""
VOLUMES = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}
NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")
"""Of a RayJob: what KubeRay takes, which makes longer names of it. The run's folder has the same."""
LOST = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
IMAGE = re.compile(r"[^:@]+(?::\d+/[^:@]+)?(?::(?P<tag>[\w.-]+))?(?P<digest>@sha256:[0-9a-f]{64})?")


def pinned_ray() -> str:
    """The Ray version of constraints.txt."""
    found = re.search(r"^ray==(\S+)$", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise ValueError("constraints.txt pins no ray")
    return found.group(1)


def overlays() -> list[Path]:
    """The folders of overlays/ that can be applied."""
    return sorted(path.parent for path in FOLDER.glob("overlays/*/kustomization.yaml"))


def render(overlay: Path) -> str:
    """What ``kubectl apply -k`` would send. RuntimeError with kubectl's words where that fails."""
    done = subprocess.run(["kubectl", "kustomize", str(overlay)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{overlay.name}: {done.stderr.strip()}")
    return done.stdout


def check(documents: list[Document]) -> list[Finding]:
    """Everything wrong with the documents of one overlay, a line each; empty where all is well."""
    have = {(d["kind"], d["metadata"]["name"]) for d in documents} | GIVEN
    findings = []
    for document in documents:
        where = f"{document['kind']}/{document['metadata']['name']}"
        found = [*_schema(document)]
        if '"SETTING"' in json.dumps(document) or " SETTING" in json.dumps(document):
            found.append("a SETTING was not replaced by the overlay's settings")
        for place, template in _templates(document):
            found += [
                f"{place}: {text}" for text in (*_hardening(template), *_images(template), *_names(template, have))
            ]
        if document["kind"] in ("RayJob", "RayCluster"):
            found += [*_ray(document)]
        findings += [f"{where}: {text}" for text in found]
    return findings


# Schemas ------------------------------------------------------------------------------------------------------------


def _schema(document: Document) -> Iterator[Finding]:
    group = document["apiVersion"].rpartition("/")[0]
    if group not in OTHER_GROUPS:
        yield from _strict(document)
        return
    for place, template in _templates(document):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template}
        yield from (f"{place}: {text}" for text in _strict(wrapped))


def _strict(document: Document) -> Iterator[Finding]:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message[:300]}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message


def _templates(document: Document) -> Iterator[tuple[str, Document]]:
    """Every pod template of a document, and what it is of."""
    spec = document.get("spec") or {}
    if document["kind"] in ("Deployment", "StatefulSet", "DaemonSet", "Job"):
        yield "pod", spec["template"]
    if document["kind"] == "RayJob":
        yield "submitter", spec["submitterPodTemplate"]
    cluster = ray_cluster(document)
    if cluster:
        yield "head", cluster["headGroupSpec"]["template"]
        yield from ((group["groupName"], group["template"]) for group in cluster["workerGroupSpecs"])


def ray_cluster(document: Document) -> Document:
    """The Ray cluster's spec of a RayJob or RayCluster; empty for other kinds."""
    if document["kind"] == "RayJob":
        return dict(document["spec"]["rayClusterSpec"])
    return dict(document["spec"]) if document["kind"] == "RayCluster" else {}


# Pods ---------------------------------------------------------------------------------------------------------------


def _hardening(template: Document) -> Iterator[Finding]:
    """The restricted standard, and what this project asks for beside it."""
    pod = template["spec"]
    whole = pod.get("securityContext") or {}
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} is set"
    if "serviceAccountName" not in pod or "automountServiceAccountToken" not in pod:
        yield "names no service account, or does not say whether it needs its token"
    for volume in pod.get("volumes") or []:
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {volume['name']} is of a kind that the restricted standard forbids"
    for container in (*pod["containers"], *(pod.get("initContainers") or [])):
        own = container.get("securityContext") or {}
        wanted = {
            "runAsNonRoot": own.get("runAsNonRoot", whole.get("runAsNonRoot")) is True,
            "allowPrivilegeEscalation: false": own.get("allowPrivilegeEscalation") is False,
            "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
            "capabilities.drop: [ALL]": (own.get("capabilities") or {}).get("drop") == ["ALL"],
            "no added capabilities": not (own.get("capabilities") or {}).get("add"),
            "no privileges": not own.get("privileged"),
            "seccompProfile": _seccomp(own, whole) in ("RuntimeDefault", "Localhost"),
            "requests equal to limits": _fixed(container.get("resources") or {}),
        }
        yield from (f"container {container['name']} lacks {name}" for name, good in wanted.items() if not good)


def _seccomp(own: Mapping[str, Any], whole: Mapping[str, Any]) -> str | None:
    profile = own.get("seccompProfile") or whole.get("seccompProfile") or {}
    return profile.get("type") if isinstance(profile, dict) else None


def _fixed(resources: Mapping[str, Any]) -> bool:
    requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
    return requests == limits and {"cpu", "memory"} <= set(limits)


def _images(template: Document) -> Iterator[Finding]:
    for container in (*template["spec"]["containers"], *(template["spec"].get("initContainers") or [])):
        image = container.get("image", "")
        found = IMAGE.fullmatch(image)
        if found is None or not (found["digest"] or found["tag"] not in (None, "latest", "nightly")):
            yield f"image {image!r} is not pinned to a tag or digest"


def _names(template: Document, have: set[tuple[str, str]]) -> Iterator[Finding]:
    """Names in the pod that lead nowhere."""
    pod = template["spec"]
    volumes = {volume["name"]: volume for volume in pod.get("volumes") or []}
    wanted = [("ServiceAccount", pod.get("serviceAccountName"))]
    for volume in volumes.values():
        wanted += [
            ("ConfigMap", (volume.get("configMap") or {}).get("name")),
            ("PersistentVolumeClaim", (volume.get("persistentVolumeClaim") or {}).get("claimName")),
            ("Secret", (volume.get("secret") or {}).get("secretName")),
        ]
    for container in (*pod["containers"], *(pod.get("initContainers") or [])):
        for mount in container.get("volumeMounts") or []:
            if mount["name"] not in volumes:
                yield f"container {container['name']} mounts {mount['name']!r}, which is no volume of the pod"
        sources = [entry.get("valueFrom") or {} for entry in container.get("env") or []]
        sources += container.get("envFrom") or []
        for source in sources:
            for key, reference in source.items():
                if key.startswith(("configMap", "secret")):
                    wanted.append(("Secret" if key.startswith("secret") else "ConfigMap", reference.get("name")))
    yield from (f"{kind} {name!r} is not there" for kind, name in wanted if name and (kind, name) not in have)


# Ray ----------------------------------------------------------------------------------------------------------------


def _ray(document: Document) -> Iterator[Finding]:
    cluster, ray = ray_cluster(document), pinned_ray()
    if cluster.get("rayVersion") != ray:
        yield f"rayVersion is {cluster.get('rayVersion')!r}, the project pins {ray}"
    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode is not token: Ray's API would be open to who reaches it"
    if str(cluster["headGroupSpec"]["rayStartParams"].get("num-cpus")) != "0":
        yield 'the head takes tasks: rayStartParams num-cpus must be "0"'
    if cluster.get("enableInTreeAutoscaling") and not cluster.get("autoscalerOptions", {}).get("securityContext"):
        yield "the autoscaler has no securityContext"
    for place, template in _templates(document):
        yield from (f"{place}: {text}" for text in _lost_node(template))
        if place != "submitter":
            yield from (f"{place}: {text}" for text in _ray_pod(template))
        environment = {e["name"]: e.get("value") for e in template["spec"]["containers"][0].get("env") or []}
        if place != "submitter" and environment.get("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE") != "1":
            yield f"{place}: RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE is not 1: in a pod Ray tells of an empty disk then"
    yield from _object_stores(cluster)
    images = {c["image"] for _, template in _templates(document) for c in template["spec"]["containers"]}
    if len(images) != 1:
        yield f"its pods run different images: {', '.join(sorted(images))}"
    tagged = (image for image in images if "@" not in image)  # a digest tells no version
    yield from (f"image {image!r} is not of Ray {ray}" for image in tagged if f"-ray{ray}-" not in image)
    if document["kind"] == "RayJob":
        yield from _job(document)


def _ray_pod(template: Document) -> Iterator[Finding]:
    if "app.kubernetes.io/name" in (template["metadata"].get("labels") or {}):
        yield "the label app.kubernetes.io/name is KubeRay's: a RayJob's head Service finds no pod that has another"
    container = template["spec"]["containers"][0]
    home = {e["name"]: e.get("value") for e in container.get("env") or []}.get("CRYSTALFORMER_HOME")
    mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts") or []}
    for name in ("data", "runs"):  # the commands' own defaults
        if f"{home}/{name}" != mounts.get(name):
            yield f"CRYSTALFORMER_HOME is {home}: the default folder {name!r} would not lie in the claim"


def _lost_node(template: Document) -> Iterator[Finding]:
    """Pods of a node that is gone are given up soon: Kubernetes waits 300 s where nothing is said."""
    given = {t.get("key"): t for t in template["spec"].get("tolerations") or [] if t.get("effect") == "NoExecute"}
    for key in LOST:
        if given.get(key, {}).get("tolerationSeconds", 300) > 60:
            yield f"no toleration of {key} that ends within 60 s"


def _object_stores(cluster: Document) -> Iterator[Finding]:
    """Ray's object store has to fit in /dev/shm: else Ray puts it on the disk of /tmp, and says so in a log alone."""
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        place, pod = group.get("groupName", "head"), group["template"]["spec"]
        container = pod["containers"][0]
        names = [m["name"] for m in container.get("volumeMounts") or [] if m["mountPath"] == "/dev/shm"]
        volumes = [volume.get("emptyDir") or {} for volume in pod.get("volumes") or [] if volume["name"] in names]
        if not volumes or volumes[0].get("medium") != "Memory" or "sizeLimit" not in volumes[0]:
            yield f"{place}: /dev/shm is no volume in memory with a sizeLimit"
            continue
        memory = _bytes((container.get("resources") or {}).get("limits", {}).get("memory", "0"))
        shm, given = _bytes(volumes[0]["sizeLimit"]), group["rayStartParams"].get("object-store-memory")
        store = object_store(memory, shm) if given is None else int(given)
        if store > shm:
            yield f"{place}: an object store of {store} bytes does not fit in /dev/shm, which has {shm}"
        if shm >= memory:
            yield f"{place}: /dev/shm, which counts as the pod's memory, may take all of it"


def object_store(memory: int, shm: int) -> int:
    """The bytes that ``ray start`` gives its object store where it is told none: at most, of an idle machine."""
    cap = min(
        constants.DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES, max(constants.REQUIRE_SHM_SIZE_THRESHOLD, shm * 95 // 100)
    )
    return min(int(memory * constants.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION), cap)


def _bytes(quantity: str) -> int:
    """A Kubernetes quantity of memory."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(quantity)).groups()  # type: ignore[union-attr]
    return int(number) * {"": 1, "M": 10**6, "G": 10**9, "Mi": 2**20, "Gi": 2**30}[unit]


def _job(document: Document) -> Iterator[Finding]:
    spec, words = document["spec"], document["spec"]["entrypoint"].split()
    name = document["metadata"]["name"]
    if not NAME.fullmatch(name):
        yield (
            f"{name!r} cannot be the name of a run or study, which is the RayJob's too:"
            " lower-case letters, digits and -, a letter first, no - last, at most 47"
        )
    if not spec["submitterPodTemplate"]["spec"]["containers"][0].get("livenessProbe"):
        yield "the submitter has no livenessProbe: it would wait for ever for a head that was lost with its node"
    for name in ("backoffLimit", "activeDeadlineSeconds", "preRunningDeadlineSeconds", "ttlSecondsAfterFinished"):
        if not spec.get(name):
            yield f"{name} is not set"
    if "suspend" in spec:
        yield "suspend is set: applied again it would end the job's cluster; Kueue sets it when the job is made"
    if "--auto_resume" not in words:
        yield "the entrypoint lacks --auto_resume: a retry would be refused"
    workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    if "--num_workers" in words:
        asked = int(words[words.index("--num_workers") + 1])
        if {workers["replicas"], workers["minReplicas"], workers["maxReplicas"]} != {asked}:
            yield f"--num_workers {asked} is not the fixed number of worker pods"
    if "--concurrent" in words and int(words[words.index("--concurrent") + 1]) != workers["maxReplicas"]:
        yield f"--concurrent is not the most worker pods, {workers['maxReplicas']}"


# Command ------------------------------------------------------------------------------------------------------------


def validator(schemas: str, path: Path) -> subprocess.CompletedProcess[str]:
    """The run of validate.py in the folder ``schemas`` on a rendered file."""
    external = [word for kind, name in sorted(GIVEN) for word in ("--external", f"{kind}/{name}")]
    options = ["--crds", f"{schemas}/crds", "--check-refs", "--production", *external]
    words = [sys.executable, f"{schemas}/validate.py", *options, str(path)]
    return subprocess.run(words, capture_output=True, text=True)


def main() -> int:
    """0: all overlays are good; 1: findings, a line each; 2: there is no kubectl."""
    if shutil.which("kubectl") is None:
        sys.stderr.write("error: kubectl is not on PATH; it renders the overlays (kubernetes.io/docs/tasks/tools)\n")
        return 2
    BUILD.mkdir(exist_ok=True)
    schemas, failed = os.environ.get("KUBERAY_SCHEMAS"), False
    for overlay in overlays():
        path = BUILD / f"{overlay.name}.yaml"
        path.write_text(render(overlay), encoding="utf-8")
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        lines = check(documents)
        if schemas:
            done = validator(schemas, path)
            lines += (done.stdout + done.stderr).splitlines() if done.returncode else []
        failed = failed or bool(lines)
        name = path.relative_to(REPOSITORY)
        sys.stdout.write(
            "".join(f"{name}: {line}\n" for line in lines) or f"{name}: {len(documents)} objects, good\n"
        )
    if not schemas:
        sys.stdout.write("KUBERAY_SCHEMAS is not set: Ray's and the monitoring kinds were not held to their CRDs\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
