"""convert: the authors' files into model folders and back, on the golden vectors' weights."""

import os

import numpy as np
import pytest
import torch

from cluster.cli import main
from cluster.prediction import convert
from cluster.prediction.predict import load_predictor
from crystalformer import Crystalformer, ModelConfig, load_model
from crystalformer.artifact import ModelCard, TargetScale, read_card, save_model
from tests.cluster.trained import write_model
from tests.crystalformer import golden

INFERRED = {
    "num_layers",
    "model_dim",
    "head_num",
    "ff_dim",
    "embedding_dim",
    "norm_type",
    "value_pe_dist_real",
    "value_pe_headed",
    "num_targets",
    "pre_pooling_op",
}
"""Not given to convert where the file has radial projections."""


def checkpoint(vectors, path, averaged=2.0, **more):
    """The authors' file of golden weights in float32, the averaged ones ``averaged`` times as large."""
    count = vectors.config.num_targets
    state = {"target_mean": torch.arange(1.0, count + 1), "target_std": torch.full((count,), 0.3)}
    for key, value in vectors.weights.items():
        state["model." + key] = value.float()
        state["swa_model.module." + key] = averaged * value.float()
    state["swa_model.n_averaged"] = torch.tensor(7)
    torch.save({"state_dict": {**state, **more}, "epoch": 3}, path)
    return path, state


def options(config) -> list[str]:
    """What the shapes do not tell, as words of a command line."""
    known = INFERRED if config.value_pe_dist_real else INFERRED - {"head_num"}
    words = []
    for name, value in config.to_dict().items():
        if name not in known:
            words += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
    return words


@pytest.mark.parametrize("name", golden.NAMES)
def test_there_and_back_bit_for_bit_and_the_golden_output(name, tmp_path, capsys):
    vectors = golden.load(name)
    file, state = checkpoint(vectors, tmp_path / "theirs.ckpt", averaged=1.0)
    assert main(["convert", str(file), str(tmp_path / "ours"), *options(vectors.config)]) == 0, capsys.readouterr()
    assert read_card(tmp_path / "ours" / "model").model == vectors.config
    for folder in ("model", "model-swa"):
        predictor = load_model(tmp_path / "ours" / folder)
        found = predictor.predict_batch(vectors.batch()).numpy()
        expected = vectors.output * 0.3 + np.arange(1.0, vectors.config.num_targets + 1)
        scale = np.abs(vectors.output).max() * 0.3
        assert np.abs(found - expected).max() < 1e-4 * scale + 1e-6
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "back.ckpt"), "--to-reference"]) == 0
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]
    unset = {key for key in state if key.endswith("atten_scale")} | {"swa_model.n_averaged"}
    assert set(back) >= set(state) - unset
    for key in set(state) - unset:
        assert back[key].dtype == state[key].dtype and torch.equal(back[key], state[key]), key


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_settings_in_a_file_count(name, tmp_path, capsys):
    """PyTorch Lightning keeps those of the training beside the weights, the others of theirs among them."""
    vectors = golden.load(name)
    file, _ = checkpoint(vectors, tmp_path / "theirs.ckpt")
    content = torch.load(file, weights_only=True)
    config = vectors.config.to_dict()
    targets = [f"t{i}" for i in range(config.pop("num_targets"))]
    others = {"targets": targets, "batch_size": 128, "t_activation": "relu", "gauss_state": "q", "optimizer": "adamw"}
    del config["cutoff_sigmas"]
    content["hyper_parameters"] = config | others
    torch.save(content, file)
    assert main(["convert", str(file), str(tmp_path / "ours")]) == 0, capsys.readouterr()
    predictor = load_model(tmp_path / "ours" / "model")
    assert predictor.card.model == vectors.config and predictor.targets == tuple(targets)
    found = predictor.predict_batch(vectors.batch()).numpy()
    expected = vectors.output * 0.3 + np.arange(1.0, len(targets) + 1)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(vectors.output).max() * 0.3 + 1e-6
    words = ["--gauss_lb_real", "0.25", "--target", ",".join(f"{target}:eV" for target in targets)]
    assert main(["convert", str(file), str(tmp_path / "other"), *words]) == 0
    card = read_card(tmp_path / "other" / "model")
    assert card.model.gauss_lb_real == 0.25 and {target.unit for target in card.targets} == {"eV"}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"exclude_self": True}, "its exclude_self is True, but this model has False alone"),
        ({"gauss_state": "x-norm"}, "its gauss_state is 'x-norm', but this model has 'q' or"),
        ({"norm_type": "ln"}, "norm_type must be one of no, bn, got 'ln'"),
        ({"domain": ["real"]}, "domain must be one of"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(told, message, tmp_path, capsys):
    file, _ = checkpoint(golden.load("real_k16"), tmp_path / "theirs.ckpt")
    content = torch.load(file, weights_only=True)
    torch.save({**content, "hyper_parameters": told}, file)
    assert main(["convert", str(file), str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "ours").exists()


def test_best_and_averaged_weights_stay_apart_and_targets_get_their_names(tmp_path):
    file, state = checkpoint(golden.load("max_pool_two_targets"), tmp_path / "theirs.ckpt")
    words = [*options(golden.load("max_pool_two_targets").config), "--target", "shear:log10(GPa),n"]
    assert main(["convert", str(file), str(tmp_path / "ours"), *words]) == 0
    best, averaged = (load_model(tmp_path / "ours" / name) for name in ("model", "model-swa"))
    assert torch.equal(2 * best.model.embedding, averaged.model.embedding)
    assert [(t.name, t.unit, t.bias) for t in best.card.targets] == [("shear", "log10(GPa)", 1.0), ("n", "", 2.0)]
    assert best.card.provenance == {"converted_from": "theirs.ckpt", "weights": "model"}


def test_weights_that_were_never_averaged_are_left_out(tmp_path, capsys):
    """Theirs keeps a copy of the initial weights there until the epochs that are averaged begin."""
    vectors = golden.load("real_k16")
    file, _ = checkpoint(vectors, tmp_path / "early.ckpt", **{"swa_model.n_averaged": torch.tensor(0)})
    assert main(["convert", str(file), str(tmp_path / "ours"), *options(vectors.config)]) == 0
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["model"]
    told = capsys.readouterr().out.splitlines()[-2:]
    reason = "the file's averaged weights are the initial ones (swa_model.n_averaged is 0)"
    assert told == [f"no model-swa: {reason}", f"written   {tmp_path / 'ours' / 'model'}"]


SILENT = "domain real, {}gauss_lb_real 0.5, positive_func elu=0.1, value_pe_dist_max -10.0, value_pe_width_scale 1.0"


@pytest.mark.parametrize(
    ("dropped", "words", "assumed"),
    [
        ((), [], f"{SILENT.format('scale_real 1.4, ')}, pooling avr, pre_pooling_op no"),
        ((), ["--scale_real", "2", "--pooling", "max"], f"{SILENT.format('')}, pre_pooling_op no"),
        (
            ("target_mean", "target_std"),
            ["--pooling", "avr", "--pre_pooling_op", "no"],
            f"{SILENT.format('scale_real 1.4, ')}, target_mean 0, target_std 1",
        ),
    ],
    ids=["weights alone", "some settings given", "no scale of the targets"],
)
def test_what_the_weights_do_not_tell_is_said_to_be_assumed(dropped, words, assumed, tmp_path, capsys):
    file, _ = checkpoint(golden.load("real_k16"), tmp_path / "theirs.ckpt")
    content = torch.load(file, weights_only=True)
    for key in dropped:
        del content["state_dict"][key]
    torch.save(content, file)
    assert main(["convert", str(file), str(tmp_path / "ours"), *words]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"assumed: {assumed} (neither file nor options tell)"


def test_nothing_is_assumed_where_all_is_told(tmp_path, capsys):
    ours = write_model(tmp_path / "a")
    assert main(["convert", str(ours), str(tmp_path / "theirs.ckpt"), "--to_reference"]) == 0
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "theirs.ckpt"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"written   {tmp_path / 'b' / 'model'}\n"


@pytest.mark.parametrize("key", ["target_mean", "target_std"])
def test_a_mean_without_its_deviation_is_refused(key, tmp_path, capsys):
    file, _ = checkpoint(golden.load("real_k16"), tmp_path / "theirs.ckpt")
    content = torch.load(file, weights_only=True)
    del content["state_dict"][key]
    torch.save(content, file)
    assert main(["convert", str(file), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert "alone; target_mean and target_std belong together" in error and error.count("\n") == 1
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("taken", ["model", "model-swa"])
def test_trained_weights_are_not_written_over(taken, tmp_path, capsys):
    file, _ = checkpoint(golden.load("real_k16"), tmp_path / "theirs.ckpt")
    trained = write_model(tmp_path / "night" / taken)
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert main(["convert", str(file), str(tmp_path / "night")]) == 2
    assert capsys.readouterr().err == f"error: {trained}: exists; choose another OUT or delete it\n"
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before
    assert [path.name for path in (tmp_path / "night").iterdir()] == [taken]


def test_a_file_is_not_written_over(tmp_path, capsys):
    """As where OUT is forgotten and the next word is an input of another command."""
    ours, file = write_model(tmp_path / "a"), tmp_path / "a.cif"
    file.write_text("data_x\n")
    assert main(["convert", str(ours), str(file), "--to-reference"]) == 2
    assert capsys.readouterr().err == f"error: {file}: exists; choose another OUT or delete it\n"
    assert file.read_text() == "data_x\n"


def test_a_single_model_folder_goes_there_and_back(tmp_path):
    ours = write_model(tmp_path / "a")
    assert main(["convert", str(ours), str(tmp_path / "theirs.ckpt"), "--to_reference"]) == 0
    words = ["--scale_real", "0.9", "--target", "shear:log10(GPa),bulk:GPa"]
    assert main(["convert", str(tmp_path / "theirs.ckpt"), str(tmp_path / "b"), *words]) == 0
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["model"]
    before, after = (load_predictor(folder, torch.device("cpu")) for folder in (ours, tmp_path / "b" / "model"))
    assert before.card.model == after.card.model and before.card.targets == after.card.targets
    for name, value in before.model.state_dict().items():
        assert torch.equal(after.model.state_dict()[name], value), name


def test_two_that_write_one_file_back_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends where the first has written its file and not renamed it yet."""
    ours, out, rename = write_model(tmp_path / "a"), tmp_path / "out" / "theirs.ckpt", os.replace

    def beset(partial, path):
        monkeypatch.setattr(os, "replace", rename)
        convert._write_reference(ours, out)
        rename(partial, path)

    monkeypatch.setattr(os, "replace", beset)
    convert._write_reference(ours, out)
    assert list(out.parent.iterdir()) == [out]


def test_the_way_back_needs_no_options(tmp_path):
    """Pooling, widths, domains: what the weights do not tell goes with them."""
    settings = {"pooling": "max", "scale_real": [2.0, 1.0], "domain": "multihead", "positive_func": "abs"}
    config = ModelConfig(num_layers=2, model_dim=16, head_num=4, ff_dim=16, embedding_dim=(8,), **settings)
    model = Crystalformer(config)
    card = ModelCard(model=config, targets=(TargetScale(name="gap", unit="eV", scale=2.0, bias=0.5),))
    for name in ("model", "model-swa"):
        save_model(tmp_path / "a" / name, card, model.state_dict())
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "theirs.ckpt"), "--to_reference"]) == 0
    assert main(["convert", str(tmp_path / "theirs.ckpt"), str(tmp_path / "b")]) == 0
    back = read_card(tmp_path / "b" / "model-swa")
    assert back.model == config and [target.name for target in back.targets] == ["gap"]
    assert torch.load(tmp_path / "theirs.ckpt", weights_only=True)["state_dict"]["swa_model.n_averaged"] == 1


REFUSED = [
    ({"model.encoder.layers.1.linear1.weight": torch.zeros(3, 3)}, "layers.1.linear1.weight' have the shape (3, 3)"),
    ({"model.encoder.layers.9.linear1.weight": torch.zeros(3, 3)}, "have none of layer 2, but of layer 9"),
    ({f"model.encoder.layers.{10**9}.linear1.weight": torch.zeros(3, 3)}, f"none of layer 2, but of layer {10**9}"),
    ({"model.extra.weight": torch.zeros(3)}, "hold 'extra.weight', which this architecture lacks"),
    ({"other.weight": torch.zeros(3)}, "'other.weight' is under none of model., swa_model.module., "),
    ({"target_mean": torch.zeros(3)}, "'target_mean' holds 3 numbers for 1 targets"),
    ({"target_std": torch.tensor([float("nan")])}, "'target_std' must hold finite numbers"),
    ({"model.encoder.layers.0.linear1.weight": torch.zeros(3)}, "0.linear1.weight' have the shape (3,), not two dim"),
    ({"swa_model.module.mlp.0.weight": torch.zeros(1, 1)}, "'mlp.0.weight' have the shape (1, 1)"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED, ids=str)
def test_a_file_of_another_shape_is_refused_and_nothing_is_written(more, message, tmp_path, capsys):
    vectors = golden.load("real_k16")
    file, _ = checkpoint(vectors, tmp_path / "theirs.ckpt", **more)
    assert main(["convert", str(file), str(tmp_path / "ours"), *options(vectors.config)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--scale_real", "1000"], "the reach of attention, must be at most 100 Å, got"),
        (["--num_layers", "1000"], "numbers or more, its weights are"),
        (["--num_layers", str(10**9)], "num_layers must be at most 1000, got 1000000000"),
    ],
    ids=str,
)
def test_a_model_that_no_machine_computes_is_refused(more, message, tmp_path, capsys):
    vectors = golden.load("real_k16")
    file, _ = checkpoint(vectors, tmp_path / "theirs.ckpt")
    assert main(["convert", str(file), str(tmp_path / "ours"), *options(vectors.config), *more]) == 2
    error = capsys.readouterr().err
    assert f"{file}: " in error and message in error and error.count("\n") == 1
    assert not (tmp_path / "ours").exists()


class Code:
    """What a pickle must not bring in."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ({"state_dict": Code()}, "no torch file of tensors and plain values"),
        ({"weights": 1}, "must hold a `state_dict` of tensors"),
        ({"state_dict": {}}, "holds no weights under model.*"),
        ([1], "must hold a `state_dict` of tensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused(content, message, tmp_path, capsys):
    file = tmp_path / "theirs.ckpt"
    if content is not None:
        torch.save(content, file)
    assert main(["convert", str(file), str(tmp_path / "ours")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_places_that_cannot_be_written_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours, (file, _) = write_model(tmp_path / "a"), checkpoint(golden.load("real_k16"), tmp_path / "theirs.ckpt")
    (tmp_path / "taken").write_text("")
    for words in (
        ["convert", str(file), "taken"],
        ["convert", str(ours), "taken/x.ckpt", "--to_reference"],
        ["convert", str(ours), "a", "--to_reference"],
        ["convert", str(ours), "", "--to_reference"],
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "taken", "theirs.ckpt"]


def test_text_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "a.ckpt").write_text("text")
    assert main(["convert", str(tmp_path / "a.ckpt"), str(tmp_path / "ours")]) == 2
    assert "no torch file of tensors" in capsys.readouterr().err


def test_the_way_back_takes_no_settings(tmp_path, capsys):
    words = ["convert", str(tmp_path), str(tmp_path / "x"), "--to_reference", "--num_layers", "3"]
    assert main(words) == 2
    assert "--to_reference takes the architecture and targets from the model folder" in capsys.readouterr().err
