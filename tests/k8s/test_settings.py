"""Every setting of the manifests is one line and goes where it belongs; what is mounted is understood."""

import re
import shlex
import shutil

import pytest
import yaml

from cluster.settings.config import TrainConfig, load_flat
from tests.k8s.rendered import OVERLAYS, REPOSITORY, check, documents, find, find_named, needs_kubectl, pod

pytestmark = needs_kubectl


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
