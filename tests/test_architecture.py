"""Imports go one way: tune -> cluster -> {crystalformer, data_pipeline}, within cluster too; libraries stay in place.

Every import statement of every module counts, also inside functions, and so do attributes such as ``ray.tune`` and
modules named by text in ``import_module("...")``. The rules are tried on small bad trees first.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = ("crystalformer", "data_pipeline", "cluster", "tune")

FORBIDDEN = {
    "crystalformer": ("ray", "deepspeed", "data_pipeline", "cluster", "tune"),
    "data_pipeline": ("torch", "deepspeed", "triton", "ray.train", "ray.tune", "crystalformer", "cluster", "tune"),
    "cluster": ("ray.tune", "optuna", "tune"),
    "tune": (),
}
ALLOWED_IN_CRYSTALFORMER = ("crystalformer", "torch", "numpy")
LAZY_IN_CRYSTALFORMER = ("triton", "numba", "llvmlite", "pymatgen", "safetensors")
"""Only inside functions and under TYPE_CHECKING."""
KERNELS = {"crystalformer.ops.triton": ("triton",), "crystalformer.ops.numba": ("numba", "llvmlite")}
"""Packages of jit-compiled code, imported lazily, and what they may import at their top."""

FOLDERS = {
    "cluster": ("settings", "run", "data", "worker", "prediction", "driver", "commands"),
    "data_pipeline": ("formats", "sources", "steps"),
}
"""Each may import those before it. What lies beside them serves all of them and imports none, but for ``ABOVE``."""
ABOVE = {"cluster": ("cli", "__main__"), "data_pipeline": ("prepare", "own", "describe")}
"""Modules beside the folders that use them all, and that no folder imports."""


@dataclass(frozen=True)
class Import:
    module: str
    line: int
    lazy: bool


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    test = node.test if isinstance(node, ast.If) else None
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def walk(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether it runs only when a function is called or never."""
    for child in ast.iter_child_nodes(node):
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if is_type_checking(node):
            inside = lazy or child not in node.orelse
        yield child, inside
        yield from walk(child, inside)


def names_in(node: ast.AST, package: list[str]) -> list[str]:
    """Modules that a node imports or touches; ``from a import b`` may mean the module a.b and counts as both."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        above = package[: len(package) - node.level + 1] if node.level else []
        base = [*above, *([node.module] if node.module else [])]
        return [".".join(base), *(".".join([*base, alias.name]) for alias in node.names)]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ray":
        return [f"ray.{node.attr}"]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in ("import_module", "__import__"):
            return [str(node.args[0].value)]
    return []


def imports_of(path: Path, root: Path) -> list[Import]:
    name = module_name(path, root)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return [
        Import(module, getattr(node, "lineno", 0), lazy)
        for node, lazy in walk(tree)
        for module in names_in(node, package)
    ]


def complaint(importer: str, found: Import) -> str | None:
    """Why a module of ours may not have this import; None where it may."""
    package = importer.split(".")[0]
    if backwards(importer, found):
        return "goes backwards"
    if any(within(found.module, forbidden) for forbidden in FORBIDDEN[package]):
        return "is forbidden"
    if package != "crystalformer":
        return None
    if any(within(found.module, kernels) and not within(importer, kernels) for kernels in KERNELS):
        return None if found.lazy else "must be lazy"
    top = found.module.split(".")[0] or package
    if top in LAZY_IN_CRYSTALFORMER:
        kernel = any(top in compilers and within(importer, kernels) for kernels, compilers in KERNELS.items())
        return None if found.lazy or kernel else "must be lazy"
    return None if top in ALLOWED_IN_CRYSTALFORMER or top in sys.stdlib_module_names else "is not among the allowed"


def height(module: str) -> int:
    """How far up a module of ours stands in its package: beside the folders 0, in the first folder 1, and so on."""
    package, *rest = module.split(".")
    name = rest[0] if rest else ""
    folders = FOLDERS.get(package, ())
    if name in ABOVE.get(package, ()):
        return len(folders) + 1
    return folders.index(name) + 1 if name in folders else 0


def backwards(importer: str, found: Import) -> bool:
    """Whether a module imports one of its own package that stands higher."""
    return importer.split(".")[0] == found.module.split(".")[0] and height(found.module) > height(importer)


def violations(root: Path) -> list[str]:
    found = []
    for package in OURS:
        for path in sorted((root / package).rglob("*.py")):
            for statement in imports_of(path, root):
                reason = complaint(module_name(path, root), statement)
                if reason is not None:
                    found.append(f"{path.relative_to(root)}:{statement.line}: import of {statement.module} {reason}")
    return found


def test_imports_go_one_way():
    assert violations(REPOSITORY) == []


@pytest.mark.parametrize("package", FOLDERS)
def test_every_folder_has_its_place(package):
    folders = {path.parent.name for path in (REPOSITORY / package).glob("*/__init__.py")}
    assert folders == set(FOLDERS[package])
    assert all((REPOSITORY / package / f"{name}.py").is_file() for name in ABOVE[package])


def test_every_package_is_walked():
    for package in OURS:
        assert (REPOSITORY / package / "__init__.py").is_file()
    seen = {i.module for i in imports_of(REPOSITORY / "cluster" / "cli.py", REPOSITORY)}
    assert {"cluster.errors", "data_pipeline.errors", "argparse"} <= seen


BAD = [
    ("crystalformer/a.py", "import ray", "ray is forbidden"),
    ("crystalformer/a.py", "def f():\n    import deepspeed", "deepspeed is forbidden"),
    ("crystalformer/a.py", "from data_pipeline.schema import x", "data_pipeline.schema is forbidden"),
    ("crystalformer/a.py", "from cluster import config", "cluster is forbidden"),
    ("crystalformer/ops/a.py", "from ...cluster import config", "cluster is forbidden"),
    ("crystalformer/a.py", "import triton", "triton must be lazy"),
    ("crystalformer/a.py", "import numba", "numba must be lazy"),
    ("crystalformer/ops/triton/a.py", "import numba", "numba must be lazy"),
    ("crystalformer/a.py", "from crystalformer.ops import numba", "crystalformer.ops.numba must be lazy"),
    ("crystalformer/a.py", "if True:\n    from pymatgen.core import Structure", "pymatgen.core must be lazy"),
    ("crystalformer/a.py", "class A:\n    import safetensors", "safetensors must be lazy"),
    ("crystalformer/a.py", "from crystalformer.ops.triton import kernels", "crystalformer.ops.triton must be lazy"),
    ("crystalformer/ops/a.py", "from .triton import launch", "crystalformer.ops.triton must be lazy"),
    ("crystalformer/a.py", "def f():\n    import scipy", "scipy is not among the allowed"),
    ("crystalformer/a.py", "if TYPE_CHECKING:\n    pass\nelse:\n    import triton", "triton must be lazy"),
    ("data_pipeline/a.py", "import torch.nn", "torch.nn is forbidden"),
    ("data_pipeline/a.py", "from ray import train", "ray.train is forbidden"),
    ("data_pipeline/a.py", "import ray\nray.tune.run()", "ray.tune is forbidden"),
    ("data_pipeline/a.py", "async def f():\n    from crystalformer import x", "crystalformer is forbidden"),
    ("data_pipeline/sources/__init__.py", "from ... import cluster", "cluster is forbidden"),
    ("cluster/a.py", "def f():\n    from ray import tune", "ray.tune is forbidden"),
    ("cluster/a.py", "import optuna", "optuna is forbidden"),
    ("cluster/a.py", "import tune.search", "tune.search is forbidden"),
    ("cluster/a.py", "from cluster.settings import config", "cluster.settings goes backwards"),
    ("cluster/run/a.py", "def f():\n    from cluster.worker.loop import x", "cluster.worker.loop goes backwards"),
    ("cluster/commands/a.py", "from cluster.cli import main", "cluster.cli goes backwards"),
    ("cluster/data/__init__.py", "from ..driver import launch", "cluster.driver goes backwards"),
    ("data_pipeline/a.py", "from data_pipeline.steps import work", "data_pipeline.steps goes backwards"),
    ("data_pipeline/steps/a.py", "from data_pipeline import own", "data_pipeline.own goes backwards"),
    ("data_pipeline/formats/a.py", "from data_pipeline.sources import raw", "data_pipeline.sources goes backwards"),
    ("cluster/a.py", "import importlib\nimportlib.import_module('tune.search')", "tune.search is forbidden"),
]


@pytest.mark.parametrize(("path", "text", "message"), BAD)
def test_a_bad_import_is_found(tmp_path, path, text, message):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text, encoding="utf-8")
    found = violations(tmp_path)
    assert any(line.endswith(f"import of {message}") for line in found), found
    assert all(line.startswith(f"{path}:") for line in found)


GOOD = [
    ("crystalformer/a.py", "import math\nimport torch\nimport numpy as np\nfrom . import b"),
    (
        "crystalformer/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pymatgen.core import Structure",
    ),
    ("crystalformer/a.py", "def f():\n    import triton\n    from crystalformer.ops.triton import launch"),
    ("crystalformer/ops/triton/a.py", "import triton.language as tl\nfrom crystalformer.ops.triton import b"),
    ("crystalformer/ops/numba/a.py", "from llvmlite import ir\nfrom crystalformer.ops.numba import b"),
    ("data_pipeline/a.py", "import ray.data\nfrom ray import data\nimport pyarrow\nray.data.range(3)"),
    ("cluster/a.py", "import torch, ray.train, crystalformer.batch, data_pipeline.schema"),
    ("cluster/driver/a.py", "from cluster.worker import b\nfrom cluster.driver import c\nfrom cluster import lock"),
    ("cluster/cli.py", "def f():\n    from cluster.commands import train"),
    ("tune/a.py", "from ray import tune as ray_tune\nimport optuna, cluster.settings.config"),
]


@pytest.mark.parametrize(("path", "text"), GOOD)
def test_a_good_import_is_left_alone(tmp_path, path, text):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text, encoding="utf-8")
    assert violations(tmp_path) == []


BLOCKING = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
        return None

sys.meta_path.insert(0, Blocker())
import {module}
"""


def import_with_blocked(module: str, *blocked: str, then: str = "") -> subprocess.CompletedProcess:
    code = BLOCKING.format(module=module, blocked=blocked) + then
    environment = {**os.environ, "PYTEST_ADDOPTS": ""}  # whatever this run of the tests was given
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environment
    )


def test_crystalformer_needs_torch_and_numpy_only():
    done = import_with_blocked(
        "crystalformer.artifact", "ray", "deepspeed", "pymatgen", "triton", "numba", "safetensors", "pyarrow"
    )
    assert done.returncode == 0, done.stderr


def test_the_blocker_blocks():
    done = import_with_blocked("crystalformer.artifact", "torch")
    assert done.returncode != 0
    assert "torch is blocked" in done.stderr


def test_the_settings_of_a_model_need_no_torch():
    done = import_with_blocked("crystalformer.config", "torch", "numpy")
    assert done.returncode == 0, done.stderr


def test_ray_trains_controller_is_told_of_process_groups_without_torch():
    done = import_with_blocked("cluster.worker.process_group", "torch")
    assert done.returncode == 0, done.stderr


def test_the_command_line_starts_without_heavy_libraries():
    done = import_with_blocked("cluster.cli", "torch", "ray", "deepspeed", "pymatgen", "pyarrow", "matplotlib")
    assert done.returncode == 0, done.stderr


def test_the_gpu_tests_are_found_where_only_torch_and_triton_are():
    libraries = "ray", "deepspeed", "numba", "pymatgen", "pyarrow", "moyopy", "optuna", "yaml", "safetensors", "rich"
    collect = 'sys.exit(pytest.main(["-m", "gpu", "--collect-only", "-p", "no:cacheprovider"]))'
    done = import_with_blocked("pytest", *libraries, then=collect)
    assert done.returncode == 0, done.stdout
    assert "tests/crystalformer/ops/triton/test_gpu.py" in done.stdout


def test_the_leaves_which_do_not_know_each_other_know_the_same_elements():
    from crystalformer.config import MAX_ATOMIC_NUMBER as OF_THE_MODEL
    from data_pipeline.validate import MAX_ATOMIC_NUMBER as OF_THE_DATA

    assert OF_THE_MODEL == OF_THE_DATA
