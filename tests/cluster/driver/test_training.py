"""Whole runs through Ray Train on real data: what they leave behind, and that workers change nothing."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from pymatgen.core import Structure

import cluster  # noqa: F401 - sets Ray's environment
from cluster.cli import main
from cluster.data.tables import BYTES_A_MB, open_split
from cluster.driver.trainer import train
from cluster.errors import RunFailed, UserError
from cluster.prediction.predict import load_predictor, pick_device
from cluster.prediction.scoring import errors_of, score_split
from cluster.run.report import read_metrics
from cluster.settings.config import load_yaml
from cluster.worker.checkpoint import read_checkpoint
from crystalformer import load_model
from data_pipeline.table import read_table
from tests.cluster.local_ray import local_ray
from tests.cluster.run.test_report import CONTRACT
from tests.cluster.small import SMALL, small_config

EPOCHS = 3
BATCH = 128
STEPS = 944 // BATCH


@pytest.fixture(scope="module")
def ray_here():
    with local_ray(3):
        yield


@pytest.fixture(scope="module")
def run(ray_here, elastic, tmp_path_factory):
    """``run(name, **settings)`` trains 3 epochs, the last of them averaged, and gives result and folder."""
    storage = tmp_path_factory.mktemp("runs")

    def run_once(name, **settings):
        common = {"batch_size": BATCH, "epochs": EPOCHS, "swa_epochs": 1, "lr": 2e-3, "sch_params": [20.0]}
        places = {"data_dir": str(elastic.path.parent), "storage_path": str(storage), "run_name": name}
        scale = {"threads_per_worker": 1, "device": "cpu", "dataset": "elastic_tensor_2015"}
        config = small_config(**common | places | scale | {"num_layers": 1} | settings)
        return config, train(config), storage / name

    return run_once


@pytest.fixture(scope="module")
def two(run):
    return run("two", num_workers=2)


@pytest.fixture(scope="module")
def batch_norm(run):
    """One target, the model's batch norm, everything sharded."""
    return run("bn", target=["shear"], num_workers=2, zero_stage=3, gradient_accumulation=2, norm_type="bn",
               wall_clock_breakdown=True)  # fmt: skip


def curve(folder) -> list[list[float]]:
    return [[row["train_loss"], *row["val_mae"].values()] for row in read_metrics(folder)]


# The same run -----------------------------------------------------------------------------------------------------


def test_a_run_repeats_bit_for_bit(run, two):
    again = run("two-again", num_workers=2)
    exact = ("epoch", "step", "lr", "train_loss", "grad_norm", "val_mae")
    first, second = (
        [{key: row[key] for key in exact} for row in read_metrics(folder)] for _, _, folder in (two, again)
    )
    assert first == second
    assert two[1].test_mae == again[1].test_mae
    assert two[1].test_mae_swa == again[1].test_mae_swa
    assert (two[2] / "predictions.csv").read_bytes() == (again[2] / "predictions.csv").read_bytes()


def test_one_worker_draws_the_same_curve_as_two(run, two):
    alone = run("one", num_workers=1)
    assert np.array(curve(two[2])) == pytest.approx(np.array(curve(alone[2])), rel=1e-4)
    assert two[1].test_mae == pytest.approx(alone[1].test_mae, rel=1e-4)
    assert two[1].test_mae_swa == pytest.approx(alone[1].test_mae_swa, rel=1e-4)
    assert (alone[1].world_size, two[1].world_size) == (1, 2)


@pytest.mark.parametrize(("workers", "stage", "accumulation", "limit_mb"), [(3, 0, 1, 1), (2, 3, 2, 4096)])
def test_workers_sharding_accumulation_and_disk_draw_the_same_curve(
    run, two, elastic, workers, stage, accumulation, limit_mb
):
    """The first reads its training split from disk, where the others have it in Ray's object store."""
    config, *_ = two
    tables = open_split(elastic, "train", config.data.target, config.model.neighborhood)
    assert BYTES_A_MB < tables.num_bytes < config.data.memory_limit_mb * BYTES_A_MB
    name = f"{workers}-{stage}-{accumulation}"
    settings = {"zero_stage": stage, "gradient_accumulation": accumulation, "memory_limit_mb": limit_mb}
    sharded = run(name, num_workers=workers, **settings)
    assert (sharded[1].world_size, sharded[1].zero_stage) == (workers, stage)
    assert np.array(curve(two[2])) == pytest.approx(np.array(curve(sharded[2])), rel=1e-4)
    assert two[1].test_mae_swa == pytest.approx(sharded[1].test_mae_swa, rel=1e-4)


# What it leaves behind --------------------------------------------------------------------------------------------


@pytest.fixture(params=["two", "batch_norm"])
def finished(request):
    return request.getfixturevalue(request.param)


def test_results_hold_what_is_promised(finished, elastic):
    config, result, folder = finished
    written = json.loads((folder / "results.json").read_text())
    assert set(CONTRACT) <= set(written)
    targets = list(config.data.target)
    assert written["targets"] == targets
    assert written["units"] == dict.fromkeys(targets, "log10(GPa)")
    for name in ("val_mae", "test_mae", "test_mae_swa"):
        assert list(written[name]) == sorted(targets)
        assert all(0 < error < 3 for error in written[name].values())
    sizes = elastic.sizes
    assert [written[f"{split}_size"] for split in ("train", "val", "test")] == [sizes.train, sizes.val, sizes.test]
    model = load_model(folder / "model").model
    assert written["num_parameters"] == sum(p.numel() for p in model.parameters()) + 3
    best, averaged = (load_model(folder / name).card.provenance for name in ("model", "model-swa"))
    assert (best["val_mae"], best["test_mae"]) == (written["val_mae"], written["test_mae"])
    assert averaged["test_mae"] == written["test_mae_swa"] and "val_mae" not in averaged, "it was not validated"
    assert (written["world_size"], written["zero_stage"]) == (2, config.scale.zero_stage)
    assert written["device"].startswith("cpu")
    assert 50 < written["peak_memory_mb"] < 5000
    assert 0 < written["structures_per_second"]
    assert written["wall_seconds"] == result.wall_seconds > 1


def test_metrics_have_a_row_an_epoch(finished):
    config, result, folder = finished
    rows = read_metrics(folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [(e, e * STEPS) for e in range(1, EPOCHS + 1)]
    # The rate falls by the square root, and is held from the first averaged step on.
    assert [row["lr"] for row in rows] == pytest.approx(
        [2e-3 * (20 / (20 + step)) ** 0.5 for step in (STEPS - 1, 2 * STEPS - 1, 2 * STEPS)]
    )
    for row in rows:
        assert set(row) >= {"train_loss", "val_mae", "structures_per_s", "seconds", "grad_norm", "data_wait_s"}
        assert list(row["val_mae"]) == list(config.data.target)
        assert row["grad_norm"] > 0
    assert rows[0]["train_loss"] > rows[-1]["train_loss"]
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert rows[result.best_epoch - 1]["val_mae"] == result.val_mae
    if len(config.data.target) == 1:
        assert result.val_mae == min((row["val_mae"] for row in rows), key=lambda errors: errors["shear"])


def test_tensorboard_shows_the_same_numbers(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, _, folder = finished
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = read_metrics(folder)
    for tag, values in [
        ("train_loss", [row["train_loss"] for row in rows]),
        ("grad_norm", [row["grad_norm"] for row in rows]),
        *((f"val_mae/{target}", [row["val_mae"][target] for row in rows]) for target in config.data.target),
    ]:
        assert [event.step for event in events.Scalars(tag)] == [1, 2, 3]
        assert [event.value for event in events.Scalars(tag)] == pytest.approx(values, rel=1e-6)


def test_the_models_predict_what_was_written(finished, elastic):
    """From the crystals alone, neighbours found afresh: predictions.csv, and both test errors."""
    config, result, folder = finished
    targets = list(config.data.target)
    table = read_table(elastic.split_path("test"), targets).to_pylist()
    structures = [
        Structure(
            np.reshape(row["lattice"], (3, 3)), row["atomic_numbers"], row["positions"], coords_are_cartesian=True
        )
        for row in table
    ]
    truth = np.array([[row[target] for target in targets] for row in table])
    with (folder / "predictions.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["material_id"] for row in written] == [row["material_id"] for row in table]
    suffixes = [""] if len(targets) == 1 else [f"_{target}" for target in targets]
    columns = np.array([[[float(row[c + s]) for s in suffixes] for c in ("target", "prediction")] for row in written])
    assert columns[:, 0].tolist() == [[float(f"{value:.8g}") for value in row] for row in truth]

    for name, errors in (("model", result.test_mae), ("model-swa", result.test_mae_swa)):
        predictor = load_model(folder / name)
        assert predictor.targets == tuple(targets)
        prediction = predictor.predict(structures).numpy()
        error = np.abs(prediction - truth).mean(0)
        assert error == pytest.approx([errors[target] for target in targets], rel=1e-5)
        if name == "model":
            assert prediction == pytest.approx(columns[:, 1], rel=1e-5, abs=1e-5)
    if not np.isclose(result.test_mae[targets[0]], result.test_mae_swa[targets[0]]):
        assert (folder / "model/model.safetensors").read_bytes() != (
            folder / "model-swa/model.safetensors"
        ).read_bytes()


def test_the_folder_is_complete(finished):
    config, _, folder = finished
    assert load_yaml(folder / "config.yaml") == config
    for name in ("parity.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    checkpoints = [path.parent for path in folder.glob("*/state.json")]
    assert 1 <= len(checkpoints) <= config.scale.keep_checkpoints
    last = max((read_checkpoint(checkpoint) for checkpoint in checkpoints), key=lambda state: state.position.step)
    assert (last.position.epoch, last.position.step) == (EPOCHS + 1, EPOCHS * STEPS)
    assert last.optimizer_step == EPOCHS * STEPS
    assert last.average_count == STEPS
    for name in ("model", "model-swa"):
        card = json.loads((folder / name / "config.json").read_text())
        assert card["model"]["model_dim"] == SMALL["model_dim"]
        assert [target["unit"] for target in card["targets"]] == ["log10(GPa)"] * len(config.data.target)


@pytest.mark.parametrize(("weights", "key"), [("model", "test_mae"), ("model-swa", "test_mae_swa")])
def test_evaluate_finds_the_errors_of_the_run(two, elastic, weights, key, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where it draws its picture
    _, _, folder = two
    expected = json.loads((folder / "results.json").read_text())[key]
    cpu = pick_device("cpu")
    scored = score_split(
        load_predictor(folder / weights, cpu), cpu, "elastic_tensor_2015", "test", elastic.path.parent
    )
    for column, target in enumerate(("shear", "bulk")):
        errors = errors_of(scored.truth[:, column], scored.prediction[:, column])
        assert errors.mae == pytest.approx(expected[target], rel=1e-5)
    assert main(["evaluate", str(folder / weights), "--data-dir", str(elastic.path.parent)]) == 0
    text = capsys.readouterr().out
    shown = re.findall(r"^  MAE       (\S+) log10\(GPa\)$", text, re.MULTILINE)
    assert [float(number) for number in shown] == pytest.approx([expected["shear"], expected["bulk"]], abs=1.1e-4)
    assert text.count("  worst     ") == 10


def test_a_finished_run_that_is_resumed_is_left_as_it_is(run, two, tmp_path):
    """A copy of it: the folder of ``two`` is looked at by others."""
    _, result, folder = two
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    _, again, _ = run(folder.name, num_workers=2, resume=True, storage_path=str(tmp_path))
    for name in ("metrics.jsonl", "predictions.csv"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes(), name
    for key in ("best_epoch", "val_mae", "test_mae", "test_mae_swa"):
        assert getattr(again, key) == getattr(result, key)
        was, now = (json.loads((place / "results.json").read_text())[key] for place in (folder, copy))
        assert now == was, key


# What is refused, before any worker starts ------------------------------------------------------------------------


def test_a_run_that_exists_is_not_written_over(run, two):
    _, _, folder = two
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(UserError, match="run_name 'two' exists in"):
        run("two", num_workers=2)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_batch_larger_than_the_split_is_refused(run):
    with pytest.raises(UserError, match="batch_size must be at most the 944 training crystals, got 945"):
        run("large", batch_size=945)


def test_resuming_a_run_that_is_not_there_is_refused(run):
    with pytest.raises(UserError, match="run_name 'nowhere' cannot be resumed"):
        run("nowhere", resume=True)


def test_resuming_with_another_recipe_is_refused(run, two):
    with pytest.raises(UserError, match=r"lr is 0.5 but the run to resume was started with 0.002"):
        run("two", num_workers=2, resume=True, lr=0.5)


def test_the_time_of_each_epoch_is_broken_down_where_asked(two, batch_norm):
    assert not any("seconds_of" in row for row in read_metrics(two[2]))
    for row in read_metrics(batch_norm[2]):
        assert set(row["seconds_of"]) == {"data", "forward", "backward", "update", "validation"}
        assert 0 < sum(row["seconds_of"].values()) < row["seconds"] * 1.01


def test_a_run_that_diverges_says_so_in_one_line(run):
    with pytest.raises(
        RunFailed, match=r"^training diverged in epoch 1: the loss is (nan|inf); try --lr below 1e\+30$"
    ):
        run("diverged", lr=1e30)


def test_a_value_that_deepspeed_refuses_is_told_by_itself(run, tmp_path):
    """And is not tried again max_failures times."""
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": "much"}}')
    with pytest.raises(RunFailed, match="^ValidationError: reduce_bucket_size: Input should be a valid integer"):
        run("refused", deepspeed=str(file))
