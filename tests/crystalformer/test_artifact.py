"""The model folder: what is saved predicts bit for bit the same once loaded; what is wrong with a folder is named."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crystalformer import Crystalformer, ModelConfig, load_model
from crystalformer.artifact import (
    CONFIG,
    WEIGHTS,
    WORK_AT_ONCE,
    ModelCard,
    Predictor,
    TargetScale,
    TrainRanges,
    batch_ends,
    batch_work,
    read_card,
    save_model,
)
from crystalformer.ops.reciprocal import wave_vectors
from tests.crystalformer.crystals import batch_of, golden_crystals, golden_structures

SETTINGS = ModelConfig(
    model_dim=32, head_num=4, ff_dim=48, num_layers=2, embedding_dim=(24,), value_pe_dist_real=16, num_targets=2
)
TARGETS = (
    TargetScale(name="shear", unit="log10(GPa)", scale=0.5, bias=1.25),
    TargetScale(name="n", unit="1", scale=2.0, bias=-3.0),
)
CARD = ModelCard(model=SETTINGS, targets=TARGETS, provenance={"dataset": "elastic_tensor_2015", "seed": 7})


@pytest.fixture
def model():
    model = Crystalformer(SETTINGS).train()
    model(batch_of(*golden_crystals()))  # freezes the statistics: they must travel, too
    return model.eval()


@pytest.fixture
def folder(model, tmp_path):
    save_model(tmp_path / "run" / "model", CARD, model.state_dict())
    return tmp_path / "run" / "model"


def rewrite(folder, change) -> None:
    """``change`` what config.json says."""
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))


def test_a_saved_model_predicts_the_same_bit_for_bit(model, folder):
    batch = batch_of(*golden_crystals())
    loaded = load_model(folder)
    assert torch.equal(loaded.model(batch), model(batch))
    assert torch.equal(loaded.predict_batch(batch), Predictor(model, CARD).predict_batch(batch))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert not loaded.model.training


def test_the_card_comes_back_as_it_was(folder):
    assert read_card(folder) == CARD
    assert load_model(str(folder)).card == CARD
    assert load_model(folder).targets == ("shear", "n")


def test_predictions_are_in_the_targets_own_units(model, folder):
    batch = batch_of(*golden_crystals())
    with torch.no_grad():
        normalized = model(batch).double().numpy()
    found = load_model(folder).predict_batch(batch)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), normalized * [0.5, 2.0] + [1.25, -3.0], rtol=1e-15)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_structures_are_predicted_in_their_order_whatever_the_batches(folder, batch_size):
    """float32, and blocks of other atoms end at other shells: 1e-5."""
    predictor = load_model(folder)
    found = predictor.predict((s for s in golden_structures()), batch_size=batch_size)
    np.testing.assert_allclose(found, predictor.predict_batch(batch_of(*golden_crystals())), rtol=1e-5)


def test_batches_hold_so_much_work_and_a_crystal_at_least():
    limit = WORK_AT_ONCE
    assert list(batch_ends([])) == []
    assert list(batch_ends([2 * limit, 2 * limit])) == [1, 2]
    assert list(batch_ends([0.5 * limit, 0.4 * limit, 0.2 * limit, 1, limit])) == [2, 4, 5]
    assert list(batch_ends([1] * 7, 3)) == [3, 6, 7]


def test_work_is_the_images_a_batch_holds(folder):
    """The density tells how many there are; shells are fewer where images are as far away as one another."""
    radius = SETTINGS.neighbor_radius
    for crystal in golden_crystals():
        atoms, volume = len(crystal.numbers), abs(np.linalg.det(crystal.lattice))
        shells = batch_of(crystal).shells(radius)
        assert batch_work(atoms, volume, radius) == pytest.approx(int(shells.count.sum()), rel=0.2)
        assert len(shells.neighbor) <= 1.2 * batch_work(atoms, volume, radius)


@pytest.mark.parametrize("pooling", ["avr", "max"])
def test_a_prediction_does_not_depend_on_the_cell(pooling):
    """A primitive cell and multiples of it, in real space."""
    torch.manual_seed(1)
    config = replace(SETTINGS, pooling=pooling)
    model = Crystalformer(config)
    model.freeze_statistics(batch_of(*golden_crystals()))
    predictor = Predictor(model, replace(CARD, model=config))
    small = [structure for structure in golden_structures() if len(structure) <= 8]
    primitive = predictor.predict(small)
    for repeats in ((2, 1, 1), (1, 2, 2)):
        found = predictor.predict([structure * repeats for structure in small])
        np.testing.assert_allclose(found, primitive, rtol=1e-5, atol=1e-5)


def test_ranges_travel_with_the_card(model, tmp_path):
    ranges = TrainRanges(cell_sizes=(1, 40), number_densities=(0.01, 0.15))
    save_model(tmp_path, replace(CARD, ranges=ranges), model.state_dict())
    assert read_card(tmp_path).ranges == ranges
    rewrite(tmp_path, lambda values: values["ranges"].pop("cell_sizes"))
    with pytest.raises(ValueError, match="config.json: ranges lack 'cell_sizes'"):
        read_card(tmp_path)


def test_no_structures_no_rows(folder):
    assert load_model(folder).predict([]).shape == (0, 2)


def test_a_batch_size_below_1_is_refused(folder):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        load_model(folder).predict(golden_structures(), batch_size=0)


def test_a_single_structure_and_a_cell_without_volume_are_refused(folder):
    from pymatgen.core import Lattice, Structure

    predictor = load_model(folder)
    with pytest.raises(ValueError, match="structures must be several, as in a list; got a single one"):
        predictor.predict(golden_structures()[0])
    with pytest.raises(ValueError, match=r"a cell must have a volume, got 0.0 Å³"):
        predictor.predict([Structure(Lattice([[1, 0, 0], [0, 1, 0], [1, 1, 0]]), ["H"], [[0, 0, 0]])])


def test_loading_draws_no_random_number_of_the_program(folder):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_model(folder)
    assert torch.equal(torch.rand(1), expected)


def test_the_backend_can_be_chosen(folder):
    batch = batch_of(*golden_crystals())
    oracle = load_model(folder, backend="reference").predict_batch(batch)
    fast = load_model(folder).predict_batch(batch)
    np.testing.assert_allclose(fast, oracle, rtol=1e-5)
    assert not torch.equal(fast, oracle)


def test_saving_again_replaces_both_files_and_leaves_nothing_else(model, folder):
    changed = {name: value * 2 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    save_model(folder, CARD, changed)
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CONFIG])
    assert torch.equal(load_model(folder).model.embedding, 2 * model.embedding)


def test_two_that_save_into_one_folder_do_not_meet(model, folder, monkeypatch):
    """The second begins and ends where the first has written its file and not renamed it yet."""
    rename = Path.replace

    def beset(partial, path):
        monkeypatch.setattr(Path, "replace", rename)
        save_model(folder, CARD, model.state_dict())
        return rename(partial, path)

    monkeypatch.setattr(Path, "replace", beset)
    save_model(folder, CARD, model.state_dict())
    assert sorted(path.name for path in folder.iterdir()) == sorted([WEIGHTS, CONFIG])


def test_weights_that_share_memory_are_saved(model, tmp_path):
    """A transposed view and a slice, as state dicts may hold; safetensors alone would refuse the first."""
    weights = dict(model.state_dict())
    weights["embedding"] = torch.empty(32, 98).normal_().T
    save_model(tmp_path, CARD, weights)
    assert torch.equal(load_model(tmp_path).model.embedding, weights["embedding"])


def test_a_number_that_json_lacks_is_refused_and_the_old_card_stays(model, folder):
    broken = replace(CARD, provenance={"test_mae": math.nan})
    with pytest.raises(ValueError, match="Out of range float"):
        save_model(folder, broken, model.state_dict())
    assert read_card(folder) == CARD


def test_a_card_has_a_scale_for_each_target():
    with pytest.raises(ValueError, match="targets must be 2, got 1"):
        ModelCard(model=SETTINGS, targets=TARGETS[:1])


def test_a_folder_without_a_card_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a model folder: it has no config.json"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_named(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        load_model(folder)


def test_weights_that_are_no_safetensors_are_named(folder):
    (folder / WEIGHTS).write_bytes(b"not a model")
    with pytest.raises(ValueError, match="model.safetensors"):
        load_model(folder)


WRONG_CARDS = [
    (lambda v: v.pop("format_version"), "config.json lacks 'format_version'"),
    (lambda v: v.pop("targets"), "config.json lacks 'targets'"),
    (lambda v: v.pop("model"), "config.json lacks 'model'"),
    (lambda v: v.update(format_version=2), "config.json has format_version 2, this code reads 1"),
    (lambda v: v["model"].update(num_layer=3), "unknown model setting 'num_layer'"),
    (lambda v: v["model"].update(scale_real=-1), "scale_real must be greater than 0"),
    (lambda v: v["targets"].pop(), "targets must be 2, got 1"),
    (lambda v: v["targets"][0].pop("unit"), "config.json.*unit"),
    (lambda v: v["targets"][0].update(colour="red"), "config.json.*colour"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CARDS)
def test_what_is_wrong_with_a_card_is_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1"),
        ("[" * 100_000, "brackets within brackets, too deep to be a card"),
        (None, "cannot convert float infinity to integer"),
    ],
)
def test_a_card_that_cannot_be_is_named(folder, text, message):
    if text is None:
        ranges = {"cell_sizes": [1, float("inf")], "number_densities": [0.1, 0.2]}
        rewrite(folder, lambda values: values.update(ranges=ranges))
    else:
        (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=f"model/config.json: .*{message}"):
        read_card(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"lacks 'blocks\.2\."),
        ({"num_layers": 1}, r"holds 'blocks\.1\..*', which its config.json lacks"),
        ({"ff_dim": 64}, r"'blocks\.0\.linear1\.weight' has the shape \(48, 32\), not \(64, 32\)"),
        ({"value_pe_dist_real": 0}, r"holds 'blocks\.0\.attention\.radial_weight', which its config.json lacks"),
        (
            {"domain": "multihead"},
            r"'blocks\.0\.attention\.radial_weight' has the shape \(4, 8, 16\), not \(2, 8, 16\)",
        ),
    ],
)
def test_weights_that_do_not_fit_the_card_are_named(folder, change, message):
    rewrite(folder, lambda values: values["model"].update(change))
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        load_model(folder)


def test_waves_are_counted_by_their_number():
    """Of a cell with vacuum there are many, which bound a batch as images do."""
    config = replace(SETTINGS, domain="reci")
    assert SETTINGS.wave_radius == 0 < config.wave_radius
    lattice = torch.diag(torch.tensor([4.0, 5.0, 30.0], dtype=torch.float64))
    waves = len(wave_vectors(lattice, config.wave_radius))
    alone, volume = batch_work(10, 600.0, 0.0), 600.0
    counted = (batch_work(10, volume, 0.0, config.wave_radius) - alone) * 16 / 18
    assert counted == pytest.approx(waves, rel=0.1)


CARDS = [
    ({"scale": float("nan")}, "a target's scale must be a finite number, got nan"),
    ({"bias": "2"}, "a target's bias must be a finite number, got '2'"),
    ({"scale": None}, "a target's scale must be a finite number, got None"),
    ({"name": 3}, "a target's name must be a text, got 3"),
]


@pytest.mark.parametrize(("changed", "message"), CARDS)
def test_a_damaged_card_is_named_with_its_file(folder, tmp_path, changed, message):
    card = json.loads((folder / "config.json").read_text())
    card["targets"][0] |= changed
    (tmp_path / "config.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        read_card(tmp_path)


def test_provenance_and_sizes_that_cannot_be(folder, tmp_path):
    card = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**card, "provenance": [1]}))
    with pytest.raises(ValueError, match=r"config.json: provenance must be a mapping, got \[1\]"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    "sizes",
    [{"ff_dim": 10**14}, {"num_layers": 1000}, {"embedding_dim": [10**6] * 2}, {"value_pe_dist_real": 10**9}],
)
def test_a_model_far_larger_than_its_weights_is_refused_before_memory_is_taken(folder, sizes):
    rewrite(folder, lambda values: values["model"].update(sizes))
    with pytest.raises(
        ValueError, match=r"config.json: no such model can be made: it has \d+ numbers or more, its w"
    ):
        load_model(folder)


def test_weights_of_a_training_that_diverged_are_refused(folder, tmp_path):
    card = read_card(folder)
    weights = load_model(folder).model.state_dict()
    weights["embedding"][0, 0] = float("nan")
    save_model(tmp_path, card, weights)
    with pytest.raises(ValueError, match="'embedding' holds what is no finite number"):
        load_model(tmp_path)
