"""The repository as a whole: what lies at its top, one version of Ray, a Makefile that explains itself."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = {"crystalformer", "data_pipeline", "cluster", "tune"}
TOP_LEVEL = PACKAGES | {
    ".ci",
    ".dockerignore",
    ".gitignore",
    "LICENSE",
    "Makefile",
    "README.md",
    "constraints.txt",
    "k8s",
    "pyproject.toml",
    "tests",
}
RAY_VERSION = re.compile(r"(?:rayVersion:\s*['\"]?|rayproject/ray[\w-]*:|\bray(?:\[[\w,]*\])?==)(\d+\.\d+\.\d+)")
MACHINE_PATH = re.compile(r"(?<![\w.-])/(?:work|root)/")
RULE = re.compile(r"^([a-z][a-z-]*):(?!=)(.*)$", re.MULTILINE)


def our_files() -> list[Path]:
    """Files that are ours, relative to the top: what git tracks, or everything where there is no checkout."""
    git = ["git", "-C", str(REPOSITORY), "ls-files"]
    done = subprocess.run(git, capture_output=True, text=True) if (REPOSITORY / ".git").exists() else None
    if done is None or done.returncode != 0:
        tops = [REPOSITORY / name for name in TOP_LEVEL]
        files = [path for top in tops for path in ([top] if top.is_file() else top.rglob("*"))]
        return [path.relative_to(REPOSITORY) for path in files if path.is_file() and "__pycache__" not in path.parts]
    return [Path(line) for line in done.stdout.splitlines() if (REPOSITORY / line).is_file()]


def text_of(path: Path) -> str:
    """The text of a file of ours; nothing for one that is no text."""
    try:
        return (REPOSITORY / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def project() -> dict:
    return tomllib.loads(text_of(Path("pyproject.toml")))


def test_the_top_level_is_fixed():
    found = {path.parts[0] for path in our_files()}
    assert found <= TOP_LEVEL
    assert found >= PACKAGES | {
        "Makefile",
        "LICENSE",
        "pyproject.toml",
        "constraints.txt",
        ".gitignore",
        ".ci",
        "tests",
    }


def test_there_is_one_version_of_ray():
    found = {}
    for path in our_files():
        for version in RAY_VERSION.findall(text_of(path)) if path.parts[0] != "tests" else []:
            found.setdefault(version, set()).add(str(path))
    assert len(found) == 1, found
    assert {"pyproject.toml", "constraints.txt"} <= next(iter(found.values()))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ('"ray[data,train]==2.60.0",', "2.60.0"),
        ("ray==2.60.0", "2.60.0"),
        ("FROM rayproject/ray-ml:2.61.0-py311", "2.61.0"),
        ("rayVersion: '2.60.1'", "2.60.1"),
    ],
)
def test_versions_of_ray_are_seen(text, version):
    assert RAY_VERSION.findall(text) == [version]


def test_constraints_pin_every_dependency():
    pins = re.findall(r"^([\w.-]+)==\S+$", text_of(Path("constraints.txt")), re.MULTILINE)
    pinned = {name.lower().replace("_", "-") for name in pins}
    extras = project()["project"]["optional-dependencies"].values()
    wanted = [*project()["project"]["dependencies"], *(line for extra in extras for line in extra)]
    names = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in wanted}
    assert names - {project()["project"]["name"]} <= pinned


def test_the_makefile_explains_every_target():
    makefile = text_of(Path("Makefile"))
    rules = dict(RULE.findall(makefile))
    assert {"help", "setup", "train", "test", "check"} <= set(rules)
    assert [name for name, rest in rules.items() if not re.search(r"## \S", rest)] == []
    phony = set(re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE).group(1).split())
    assert set(rules) <= phony


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_help_lists_every_target():
    done = subprocess.run(["make", "-C", str(REPOSITORY), "--no-print-directory"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("make ")}
    assert listed == set(dict(RULE.findall(text_of(Path("Makefile")))))


def test_nothing_names_a_path_of_one_machine():
    assert [str(path) for path in our_files() if MACHINE_PATH.search(text_of(path))] == []


def test_a_path_of_one_machine_is_seen():
    for folder in ("work", "root"):
        assert MACHINE_PATH.search(f'open("/{folder}/a.txt")')
    assert not MACHINE_PATH.search("https://example.org/work/a.txt")


def test_the_console_script_is_the_command_line():
    import cluster.cli

    module, _, function = project()["project"]["scripts"]["crystalformer"].partition(":")
    assert module == cluster.cli.__name__
    assert callable(getattr(cluster.cli, function))
