"""The overlays as kubectl renders them, once for all tests."""

import copy
import importlib.util
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
OVERLAYS = sorted(path.parent.name for path in REPOSITORY.glob("k8s/overlays/*/kustomization.yaml"))

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")


def load(path: str):
    """A script of k8s/ as a module; k8s is no package."""
    file = REPOSITORY / "k8s" / path
    spec = importlib.util.spec_from_file_location(f"k8s_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


check = load("check.py")


@cache
def text(overlay: str) -> str:
    """The YAML of an overlay."""
    return check.render(REPOSITORY / "k8s" / "overlays" / overlay)


@cache
def _documents(overlay: str) -> list[dict]:
    return list(yaml.load_all(text(overlay), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def documents(overlay: str) -> list[dict]:
    """The objects of an overlay, free to be changed."""
    return copy.deepcopy(_documents(overlay))


def find(objects: list[dict], kind: str, **labels: str) -> dict:
    """The one object of that kind with those labels (an underscore being app.kubernetes.io/)."""
    wanted = {f"app.kubernetes.io/{key}": value for key, value in labels.items()}
    (found,) = (
        item
        for item in objects
        if item["kind"] == kind and wanted.items() <= (item["metadata"].get("labels") or {}).items()
    )
    return found


def find_named(objects: list[dict], kind: str, name: str) -> dict:
    """The one object of that kind and name."""
    (found,) = (item for item in objects if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return found


def pod(objects: list[dict], part: str = "workerGroupSpecs", kind: str = "RayJob", instance: str = "train") -> dict:
    """The pod of a part of a Ray cluster, the first group's of the workers."""
    cluster = check.ray_cluster(find(objects, kind, instance=instance))
    group = cluster[part][0] if part == "workerGroupSpecs" else cluster[part]
    return group["template"]["spec"]
