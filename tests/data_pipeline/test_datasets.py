"""Names of data sets and targets as users spell them."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.datasets import check_name, embedded_names, find_dataset, resolve
from data_pipeline.errors import DataError
from data_pipeline.info import SourceKind, SplitSizes
from data_pipeline.prepared import load_prepared
from data_pipeline.registry import DATASETS
from data_pipeline.splits import split_sizes


@pytest.mark.parametrize(
    ("dataset", "targets", "name", "canonical"),
    [
        (None, ["shear"], "elastic_tensor_2015", ("shear",)),
        (None, ["bulk_modulus", "shear_modulus"], "elastic_tensor_2015", ("bulk", "shear")),
        (None, ["e_form"], "flla_2015", ("e_form",)),
        (None, ["n"], "dielectric_2017", ("n",)),
        ("jarvis__megnet-bulk", ["bulk_modulus"], "jarvis__megnet-bulk", ("bulk",)),
        ("jarvis__megnet", ["bandgap"], "jarvis__megnet", ("bandgap",)),
        ("dft_3d_2021", ["formation_energy"], "jarvis__dft_3d_2021", ("formation_energy",)),
        ("dft_3d_2021-mbj_bandgap", ["mbj_bandgap"], "jarvis__dft_3d_2021-mbj_bandgap", ("mbj_bandgap",)),
    ],
)
def test_resolve(dataset, targets, name, canonical, tmp_path):
    found = resolve(dataset, targets, tmp_path)
    assert (found.name, found.target_names, found.prepared) == (name, canonical, False)


@pytest.mark.parametrize(
    ("dataset", "targets", "message"),
    [
        (None, ["sheer"], "unknown target 'sheer'; the embedded data sets have shear, bulk \\(elastic_"),
        (None, ["formation_energy"], "over the network: --dataset jarvis__dft_3d_2021"),
        (None, ["shear", "n"], "no single embedded data set has all of shear, n"),
        (None, [], "no target given"),
        (None, ["shear", "shear_modulus"], "'shear' is named twice"),
        ("elastic_tensor_2015", ["n"], "elastic_tensor_2015 has no target 'n'; it has shear, bulk"),
        ("elastic_tensor", ["n"], "neither registered nor prepared under .*did you mean elastic_tensor_2015"),
        ("../x", ["n"], "neither registered nor prepared"),
    ],
)
def test_resolve_refuses(dataset, targets, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        resolve(dataset, targets, tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_name_gets_close_matches():
    with pytest.raises(DataError, match="did you mean jarvis__megnet"):
        find_dataset("jarvis_megnet")


def test_own_prepared_set_is_found_by_its_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    targets = {"hardness": {"unit": "GPa", "description": "", "train_mean": 1.0, "train_std": 2.0}}
    (folder / "dataset.json").write_text(
        json.dumps(
            {
                "name": "mine",
                "sizes": {"train": 8, "val": 1, "test": 1},
                "targets": targets,
                "elements": ["Na"],
                "rejected": {"rows": []},
                "source": "",
                "citation": "",
                "licence": "",
                "fingerprint": "f",
            }
        )
    )
    found = resolve("mine", ["hardness"], tmp_path)
    assert found.prepared and found.info.kind is SourceKind.OWN and found.targets[0].unit == "GPa"
    shutil.copytree(folder, tmp_path / "mine_old")
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(DataError, match="not a data set description"):
        resolve("mine", ["hardness"], tmp_path)
    kept = resolve("mine_old", ["hardness"], tmp_path)
    assert kept.name == load_prepared(tmp_path, "mine_old").name == "mine_old", "a copy is not the set it was made of"


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b"])
def test_names_that_are_no_folder_are_refused(name):
    with pytest.raises(DataError, match="letters, digits"):
        check_name(name)


def test_registry_is_consistent():
    names = [name for info in DATASETS for name in (info.name, *info.aliases)]
    assert len(names) == len(set(names)) == 11 + 8 + 2
    assert embedded_names() == ("elastic_tensor_2015", "flla_2015", "dielectric_2017")
    usable = {"jarvis__dft_3d_2021-ehull": 55370, "jarvis__dft_3d_2021-mbj_bandgap": 18172, "jarvis__oqmd_3d": 817636}
    for info in DATASETS:
        if info.name in usable:
            assert split_sizes(usable[info.name], info.recipe) == info.expected
    assert find_dataset("megnet").recipe.sizes == SplitSizes(train=60000, val=5000, test=4239)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_data_asks_for_the_pickles_under_every_name_they_have():
    flagged = {}
    for info in DATASETS:
        for name in (info.name, *info.aliases):
            words = ["make", "-n", f"PYTHON={sys.executable}", "data", f"DATASET={name}"]
            done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
            flagged[name] = "--allow_pickle" in done.stdout
            assert flagged[name] == (info.kind is SourceKind.MATFORMER), name
    assert flagged["megnet-shear"] and not flagged["megnet"]


def test_import_is_light():
    heavy = "('ray', 'pymatgen', 'pyarrow', 'numpy')"
    code = f"import sys, data_pipeline.datasets; print([m for m in {heavy} if m in sys.modules])"
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "[]"
