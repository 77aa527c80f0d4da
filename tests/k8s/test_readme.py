"""k8s/README.md says what is there."""

import re
import shlex
import shutil

import yaml

from cluster.cli import _parse
from tests.k8s.rendered import OVERLAYS, REPOSITORY, check, documents, find, needs_kubectl

README = (REPOSITORY / "k8s" / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def test_the_paths_it_names_are_there():
    named = set(re.findall(r"`((?:overlays|components|base|hooks)/[\w./-]+)`", README))
    assert len(named) >= 6
    assert [path for path in named if not (REPOSITORY / "k8s" / path).exists()] == []
    for name in re.findall(r"kubectl \w+ -k (k8s/\S+)", README):
        assert (REPOSITORY / name / "kustomization.yaml").is_file()


def test_it_tells_every_overlay_and_component():
    overlays, components = (
        re.search(rf"^{name}/ +(.*)$", README, re.MULTILINE)[1] for name in ("overlays", "components")
    )
    assert {re.match(r"[\w-]+", entry).group() for entry in overlays.split(" · ")} == set(OVERLAYS)
    there = {path.parent.name for path in REPOSITORY.glob("k8s/components/*/kustomization.yaml")}
    assert {re.match(r"[\w-]+", entry).group() for entry in components.split(" · ")} == there


def test_the_make_targets_and_tags_it_names_are_there():
    for target in re.findall(r"\bmake ([a-z]+)", README):
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    tags = set(re.findall(r"crystalformer:([\w.-]+)", README))
    dockerfile = (REPOSITORY / "k8s" / "Dockerfile").read_text()
    assert tags <= set(re.findall(r"-t crystalformer:(\S+)", dockerfile))


@needs_kubectl
def test_the_names_in_its_commands_are_those_of_the_overlay():
    settings = yaml.safe_load((REPOSITORY / "k8s/overlays/gpu/settings.yaml").read_text())["data"]
    assert set(re.findall(r"rayjob ([\w-]+)", README)) <= {settings["run"], settings["study"]}
    names = {item["metadata"]["name"] for item in documents("gpu")}
    assert set(re.findall(r"svc/([\w-]+)-head-svc", README)) <= names
    assert set(re.findall(r"get secret ([\w-]+)", README)) <= names, (
        "KubeRay names a token's Secret after its cluster"
    )


def commands() -> list[str]:
    """Its command lines, without their comments, each in one line."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0] for line in lines]


def test_crystalformer_takes_what_it_tells_to_submit():
    told = [line.partition(" -- crystalformer ")[2] for line in commands() if " -- crystalformer " in line]
    assert {_parse(shlex.split(line)).command_name for line in told} == {"train", "prepare", "predict"}


@needs_kubectl
def test_files_go_to_where_the_long_lived_clusters_claims_are():
    head = check.ray_cluster(find(documents("gpu"), "RayCluster", instance="cluster"))["headGroupSpec"]["template"]
    (container,) = head["spec"]["containers"]
    mounts = tuple(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in ("data", "runs"))
    copies = [line for line in commands() if " cp " in line]
    assert len(copies) == 4
    for line in copies:
        assert line.rstrip().endswith(f" -c {container['name']}")
        assert re.search(r'"\$head":(\S+)', line)[1].startswith(mounts)
    (selector,) = re.findall(r"get pods -l (\S+)", README)
    labels = {**head["metadata"]["labels"], "ray.io/node-type": "head"}  # KubeRay's
    assert dict(entry.split("=") for entry in selector.split(",")).items() <= labels.items()


@needs_kubectl
def test_what_a_selector_leaves_out_is_what_it_says():
    (selector,) = set(re.findall(r"-l 'app.kubernetes.io/instance notin \((.*?)\)'", README))
    left = [
        item["kind"]
        for item in documents("cpu-kind")
        if (item["metadata"].get("labels") or {}).get("app.kubernetes.io/instance") in selector.split(", ")
    ]
    assert sorted(left) == ["RayCluster", "RayJob"]


@needs_kubectl
def test_a_file_may_be_left_out_and_the_label_of_the_gpus_another(tmp_path):
    shutil.copytree(REPOSITORY / "k8s", tmp_path / "k8s")
    base, gpu = (tmp_path / "k8s" / folder / "kustomization.yaml" for folder in ("base", "components/gpu"))
    base.write_text(base.read_text().replace("  - rayjob-tune.yaml\n", "").replace("  - raycluster.yaml\n", ""))
    (label,) = re.findall(r"on GKE\s+`(\S+)`", README)
    gpu.write_text(gpu.read_text().replace("nvidia.com/gpu.product", label))
    objects = list(yaml.safe_load_all(check.render(tmp_path / "k8s/overlays/gpu")))
    (job,) = (item for item in objects if check.ray_cluster(item))
    assert job["metadata"]["name"] == "shear-1"
    selected = check.ray_cluster(job)["workerGroupSpecs"][0]["template"]["spec"]["nodeSelector"]
    settings = yaml.safe_load((REPOSITORY / "k8s/overlays/gpu/settings.yaml").read_text())["data"]
    assert selected == {label: settings["gpu"]}
    assert f"kubectl label node NAME nvidia.com/gpu.product={settings['gpu']}`" in README
    assert check.check(objects) == []


def pods(overlay: str, kind: str, instance: str, workers: int) -> tuple[float, int]:
    """The CPUs and GiB that a job or cluster takes with so many workers, its submitter and autoscaler included."""
    document = find(documents(overlay), kind, instance=instance)
    spec = check.ray_cluster(document)
    limits = [spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]]
    limits += [spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]] * workers
    if kind == "RayJob":
        limits += [document["spec"]["submitterPodTemplate"]["spec"]["containers"][0]["resources"]["limits"]]
    limits += [spec["autoscalerOptions"]["resources"]["limits"]] if "autoscalerOptions" in spec else []
    cpus = sum(float(x["cpu"].removesuffix("m")) / (1000 if x["cpu"].endswith("m") else 1) for x in limits)
    return cpus, sum(int(x["memory"].removesuffix("Gi")) for x in limits)


def total(*parts: tuple[float, int]) -> str:
    """As it is told."""
    return f"{sum(cpus for cpus, _ in parts):g} CPUs and {sum(memory for _, memory in parts)} GiB"


@needs_kubectl
def test_the_costs_are_those_of_the_overlay():
    told = " ".join(README.split())
    assert f"train takes 2 GPUs, {total(pods('gpu', 'RayJob', 'train', 2))}" in told
    assert f"a search up to 4 GPUs, {total(pods('gpu', 'RayJob', 'tune', 4))}" in told
    assert f"the long-lived cluster {total(pods('gpu', 'RayCluster', 'cluster', 0))} when idle" in told


@needs_kubectl
def test_so_are_those_of_a_laptop():
    told = " ".join(README.split())
    train, tune = pods("cpu-kind", "RayJob", "train", 1), pods("cpu-kind", "RayJob", "tune", 1)
    idle, busy = (pods("cpu-kind", "RayCluster", "cluster", workers) for workers in (0, 1))
    assert f"That trains and asks for {total(train)}." in told
    more = total((busy[0] - idle[0], busy[1] - idle[1]))
    assert f"all three begin, which ask for {total(train, tune, idle)}, and {more} more when" in told


@needs_kubectl
def test_the_tries_and_how_long_they_wait_are_those_of_the_jobs():
    told = " ".join(README.split())
    train, tune = (find(documents("gpu"), "RayJob", instance=name)["spec"] for name in ("train", "tune"))
    tries, hours = train["backoffLimit"] + 1, train["preRunningDeadlineSeconds"] // 3600
    assert tune["backoffLimit"] + 1 == tries
    assert tune["preRunningDeadlineSeconds"] == 3600
    assert f"A RayJob has {tries} tries," in told
    assert f"A try of train waits {hours} hours for the pods of all workers, one of tune an hour" in told
    assert f"has failed after {tries * hours} hours" in told
    assert train["activeDeadlineSeconds"] == tune["activeDeadlineSeconds"] == 3 * 24 * 3600
    assert train["preRunningDeadlineSeconds"] < train["activeDeadlineSeconds"]


def test_it_tells_of_the_address_that_holds_not_everywhere():
    """With another the autoscaler cannot add workers, and nothing but its own log says so."""
    text = (REPOSITORY / "k8s/overlays/gpu/settings.yaml").read_text()
    table = README[README.index("Change before you apply") :].partition("\n\n`")[0]
    assert "`api-server`" in table
    assert f"The {yaml.safe_load(text)['data']['api-server']}" in README
    (command,) = re.findall(r"api-server: .*# (kubectl .*)", text)
    assert f"`api-server` is what `{command}` shows" in README
