"""k8s/README.md says what is there."""

import re

import yaml

from tests.k8s.rendered import OVERLAYS, REPOSITORY, documents, needs_kubectl

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


@needs_kubectl
def test_the_costs_are_those_of_the_overlay():
    from tests.k8s.rendered import check, find

    def pods(kind, instance, workers):
        spec = check.ray_cluster(find(documents("gpu"), kind, instance=instance))
        limits = [spec["headGroupSpec"]["template"]["spec"]["containers"][0]["resources"]["limits"]]
        limits += [spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]] * workers
        limits += [{"cpu": "1", "memory": "1Gi"}] if kind == "RayJob" else []
        limits += [spec["autoscalerOptions"]["resources"]["limits"]] if "autoscalerOptions" in spec else []
        cpus = sum(float(x["cpu"].removesuffix("m")) / (1000 if x["cpu"].endswith("m") else 1) for x in limits)
        return f"{cpus:g} CPUs and\n{sum(int(x['memory'].removesuffix('Gi')) for x in limits)} GiB".replace("\n", " ")

    told = " ".join(README.split())
    assert f"train takes 2 GPUs, {pods('RayJob', 'train', 2)}" in told
    assert f"a search up to 4 GPUs, {pods('RayJob', 'tune', 4)}" in told
    assert f"the long-lived cluster {pods('RayCluster', 'cluster', 0)} when idle" in told
