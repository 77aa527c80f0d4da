"""--init_from: a run that starts from a trained model, and whether that is worth it."""

import argparse
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import cluster  # noqa: F401 - sets Ray's environment
from cluster.cli import main
from cluster.data.feed import TargetScaling
from cluster.errors import UserError
from cluster.settings.config import load_yaml
from cluster.worker.fine_tuning import Initial, load_initial, with_architecture
from crystalformer import CrystalBatch, Crystalformer, load_model
from crystalformer.artifact import read_card
from tests.benchmarks import fine_tuning
from tests.cluster.local_ray import local_ray
from tests.cluster.small import SMALL, SMALL_MODEL, small_config
from tests.cluster.trained import structures, write_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the small model of shear and bulk."""
    return write_model(tmp_path_factory.mktemp("initial") / "run" / "model", seed=5)


@pytest.fixture(scope="module")
def ray_here():
    with local_ray(2):
        yield


UNITS = {"shear": "log10(GPa)", "bulk": "GPa"}
SAME = TargetScaling(scale=(0.4, 60.0), bias=(1.5, 100.0))


def initial(model, targets=("shear", "bulk"), units=UNITS, scaling=SAME) -> tuple[Crystalformer, dict]:
    """A fresh model after it took over the trained one, and the trained weights."""
    config = small_config(target=targets, init_from=str(model))
    found = load_initial(config, units)
    assert isinstance(found, Initial)
    torch.manual_seed(0)
    fresh = Crystalformer(config.model)
    found.into(fresh, scaling)
    return fresh, dict(found.weights)


def as_words(settings) -> list[str]:
    """Settings as a command line has them."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def test_everything_is_taken_over_for_the_same_targets(model):
    scales = read_card(model).targets
    same = TargetScaling(scale=tuple(one.scale for one in scales), bias=tuple(one.bias for one in scales))
    fresh, weights = initial(model, scaling=same)
    assert fresh.frozen
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-6, atol=1e-7, msg=name)


def test_the_same_targets_begin_with_the_trained_predictions(model):
    """However the run's own data are spread: a head in the trained model's scaling was worse than the mean."""
    fresh, _ = initial(model)
    crystals = CrystalBatch.from_structures(structures()[:3])
    trained = load_model(model).predict_batch(crystals).numpy()
    np.testing.assert_allclose(SAME.restore(fresh.eval()(crystals).detach().double().numpy()), trained, rtol=1e-5)


@pytest.mark.parametrize(
    ("targets", "units"),
    [(["shear"], UNITS), (["bulk", "shear"], UNITS), (["shear", "bulk"], {**UNITS, "bulk": "eV/A^3"})],
)
def test_other_targets_and_units_get_a_fresh_head_and_keep_the_statistics(model, targets, units):
    fresh, weights = initial(model, targets, units)
    torch.manual_seed(0)
    untouched = Crystalformer(fresh.config).state_dict()
    assert fresh.frozen
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, (untouched if name.startswith("head.") else weights)[name]), name


def test_the_architecture_is_that_of_the_model_whichever_folder_is_named(model):
    for folder in (model, model.parent):
        settings = with_architecture({"target": ["shear"], "init_from": str(folder), "num_layers": 2})
        assert settings["embedding_dim"] == [32] and settings["scale_real"] == [0.9]
        assert settings["model_dim"] == SMALL_MODEL.model_dim


def test_another_architecture_is_refused_naming_both(model, capsys):
    assert main(["train", "--target", "shear", "--init_from", str(model), "--num_layers", "3"]) == 2
    error = capsys.readouterr().err
    assert f"num_layers is 3, but the model of init_from {model} has 2" in error and error.count("\n") == 1
    with pytest.raises(UserError, match="num_layers is 3, but the model of init_from .* has 2"):
        load_initial(small_config(init_from=str(model), num_layers=3), UNITS)


def test_no_model_is_named(tmp_path, capsys):
    assert main(["train", "--target", "shear", "--init_from", str(tmp_path)]) == 2
    assert f"init_from: {tmp_path} is not a model folder" in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_beats_fresh_weights_on_200_crystals(ray_here, elastic, tmp_path, capsys):
    """Into sharded weights; the run goes on without the model it began with."""
    recipe = {"epochs": 8, "batch_size": 64, "lr": 4e-3, "device": "cpu", "threads_per_worker": 1}
    words, sharded = as_words({**SMALL, **recipe}), ["--num_workers", "2", "--zero_stage", "3"]
    args = argparse.Namespace(
        seeds=1,
        crystals=200,
        model=None,
        data_dir=elastic.path.parent,
        storage_path=tmp_path,
        small=sharded,
        words=words,
    )
    found = fine_tuning.compare(args)
    assert found["fine-tuned"][0]["averaged"] < 0.95 * found["fresh weights"][0]["averaged"], found
    config = load_yaml(tmp_path / "fine-tuned-1" / "config.yaml")
    assert config.run.init_from == str(tmp_path / "bulk")
    assert read_card(tmp_path / "fine-tuned-1" / "model").provenance["init_from"] == str(tmp_path / "bulk")
    assert (config.scale.num_workers.most, config.scale.zero_stage) == (2, 3)
    shutil.rmtree(tmp_path / "bulk")
    resumed = replace(config, run=replace(config.run, resume=True))
    assert load_initial(resumed, UNITS) is None
    with pytest.raises(UserError, match="init_from: "):
        load_initial(config, UNITS)
    places = {"init_from": str(tmp_path / "bulk"), "storage_path": str(tmp_path), "run_name": "fine-tuned-1"}
    assert with_architecture({**places, "resume": True}) == {
        **places,
        "resume": True,
        **config.section_values("model"),
    }
    same = ["train", *words, *sharded, "--target", "shear", "--dataset", str(config.data.dataset), "--seed", "1"]
    same += ["--init_from", str(tmp_path / "bulk"), "--data_dir", str(elastic.path.parent)]
    same += ["--storage_path", str(tmp_path)]
    capsys.readouterr()
    assert main([*same, "--run_name", "other"]) == 2
    assert f"init_from: {tmp_path / 'bulk'}" in capsys.readouterr().err
