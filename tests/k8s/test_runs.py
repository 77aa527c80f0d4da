"""Two runs and two searches at once, applied one after the other: what is of one is not of the other."""

import re
import shutil

import pytest
import yaml

from tests.k8s.rendered import REPOSITORY, check, documents, needs_kubectl

pytestmark = needs_kubectl
KUBERAYS = {"ray.io/is-ray-node": "yes"}
"""And ray.io/node-type: labels that the operator adds."""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The objects in the cluster after the GPU overlay was applied, given other names and applied again."""
    folder = tmp_path_factory.mktemp("k8s")
    shutil.copytree(REPOSITORY / "k8s", folder / "k8s")
    settings = folder / "k8s" / "overlays" / "gpu" / "settings.yaml"
    settings.write_text(re.sub(r"^  (run|study): \S+", r"  \1: second-\1", settings.read_text(), flags=re.MULTILINE))
    second = list(yaml.safe_load_all(check.render(settings.parent)))
    return {(d["kind"], d["metadata"]["name"]): d for d in [*documents("gpu"), *second]}.values()


def pods(objects) -> dict[tuple[str, str], dict[str, str]]:
    """The labels of every Ray pod, by its job or cluster and by head or worker."""
    found = {}
    for document in objects:
        for place, template in check._templates(document) if check.ray_cluster(document) else ():
            if place != "submitter":
                part = "head" if place == "head" else "worker"
                labels = {**template["metadata"]["labels"], **KUBERAYS, "ray.io/node-type": part}
                found[document["metadata"]["name"], part] = labels
    return found


def selected(selector, objects) -> set[tuple[str, str]]:
    """The pods that a selector of plain labels matches."""
    assert set(selector) == {"matchLabels"}
    return {pod for pod, labels in pods(objects).items() if selector["matchLabels"].items() <= labels.items()}


def test_the_budget_of_a_head_is_its_own(both):
    """Kubernetes would evict one of two heads that share a budget with minAvailable: 1."""
    budgets = [document["spec"] for document in both if document["kind"] == "PodDisruptionBudget"]
    kept = [selected(budget["selector"], both) for budget in budgets]
    runs = {document["metadata"]["name"] for document in both if document["kind"] == "RayJob"}
    assert len(runs) == 4
    assert sorted(kept, key=str) == sorted(({(run, "head")} for run in runs), key=str)
    assert all(budget["minAvailable"] == 1 for budget in budgets)


def test_pods_of_two_runs_do_not_reach_each_other(both):
    """On all ports, that is: Ray's own are open within a run alone."""
    reach = {pod: {"ingress": set(), "egress": set()} for pod in pods(both)}
    for document in both:
        if document["kind"] != "NetworkPolicy":
            continue
        for way, peer in (("ingress", "from"), ("egress", "to")):
            for rule in document["spec"].get(way) or []:
                if "ports" not in rule:
                    for pod in selected(document["spec"]["podSelector"], both):
                        for entry in rule[peer]:
                            reach[pod][way] |= selected(entry["podSelector"], both)
    assert len(reach) == 10
    for (name, _), ways in reach.items():
        own = {(name, "head"), (name, "worker")}
        assert ways == {"ingress": own, "egress": own}


def test_workers_are_put_near_their_own(both):
    (terms,) = (
        check.ray_cluster(document)["workerGroupSpecs"][0]["template"]["spec"]["affinity"]["podAffinity"]
        for document in both
        if document["metadata"]["name"] == "second-run" and document["kind"] == "RayJob"
    )
    (near,) = terms["preferredDuringSchedulingIgnoredDuringExecution"]
    assert {name for name, _ in selected(near["podAffinityTerm"]["labelSelector"], both)} == {"second-run"}


def test_the_label_that_the_readme_deletes_by_finds_them(both):
    readme = (REPOSITORY / "k8s" / "README.md").read_text(encoding="utf-8")
    label, run = re.search(r"delete pdb,networkpolicy -l (\S+)=(\S+)", readme).groups()
    found = [d["kind"] for d in both if (d["metadata"].get("labels") or {}).get(label) == run]
    assert sorted(found) == ["NetworkPolicy", "PodDisruptionBudget"]
