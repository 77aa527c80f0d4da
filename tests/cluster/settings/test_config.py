"""TrainConfig: each rule on values, flat names, and config.yaml there and back."""

from dataclasses import fields, replace
from datetime import datetime

import pytest

from cluster.errors import UserError
from cluster.settings.config import (
    ALIASES,
    DERIVED,
    SECTIONS,
    TrainConfig,
    flat_fields,
    load_flat,
    load_yaml,
    save_yaml,
)
from cluster.settings.sections import DataConfig, OptimConfig, RunConfig, ScaleConfig
from crystalformer.config import ModelConfig


def config_of(**settings) -> TrainConfig:
    return TrainConfig.from_flat({"target": "shear", **settings})


def test_defaults_are_the_papers():
    config = config_of()
    assert (config.optim.lr, config.optim.adam_betas, config.optim.weight_decay) == (5e-4, (0.9, 0.98), 1e-5)
    assert (config.optim.lr_sch, config.optim.sch_params) == ("inverse_sqrt_nowarmup", (4000.0,))
    assert (config.data.batch_size, config.optim.swa_epochs, config.optim.clip_norm) == (128, 50, 1.0)
    assert (config.model.scale_real, config.model.value_pe_dist_real) == ((1.4,), 64)


def test_flat_names_are_unique_over_the_sections():
    names = [f.name for section in SECTIONS.values() for f in fields(section)]
    assert len(set(names)) == len(names)
    assert set(flat_fields()) == set(names) - set(DERIVED)
    assert not set(ALIASES) & set(names)
    assert set(ALIASES.values()) <= set(names)


def test_every_setting_has_help():
    for name, spec in flat_fields().items():
        assert len(spec.help) > 5, name


WRONG = [
    (DataConfig, {"target": ()}, "target must be one or more different property names"),
    (DataConfig, {"target": ("a", "a")}, "target must be one or more different property names"),
    (DataConfig, {"target": ("a",), "dataset": "../a"}, "dataset must be a name"),
    (DataConfig, {"target": ("a",), "data_dir": ""}, "data_dir must be"),
    (DataConfig, {"target": ("a",), "batch_size": 0}, "batch_size must be at least 1, got 0"),
    (OptimConfig, {"epochs": 0}, "epochs must be at least 1, got 0"),
    (OptimConfig, {"epochs": 2.5}, "epochs must be an integer, got 2.5"),
    (OptimConfig, {"epochs": True}, "epochs must be an integer, got True"),
    (OptimConfig, {"gradient_accumulation": 0}, "gradient_accumulation must be at least 1"),
    (OptimConfig, {"loss_func": "L2"}, "loss_func must be one of L1, MSE, Smooth_L1, got 'L2'"),
    (OptimConfig, {"optimizer": "sgd"}, "optimizer must be one of adamw, adam"),
    (OptimConfig, {"lr": 0}, "lr must be greater than 0"),
    (OptimConfig, {"lr": float("nan")}, "lr must be a number, got nan"),
    (OptimConfig, {"lr": "fast"}, "lr must be a number, got 'fast'"),
    (OptimConfig, {"lr": None}, "lr must be a number, got None"),
    (OptimConfig, {"adam_betas": (0.9,)}, "adam_betas must be two numbers"),
    (OptimConfig, {"adam_betas": (0.9, 1.0)}, "adam_betas must be two numbers"),
    (OptimConfig, {"weight_decay": -1}, "weight_decay must be at least 0"),
    (OptimConfig, {"clip_norm": -1}, "clip_norm must be at least 0"),
    (OptimConfig, {"swa_epochs": -1}, "swa_epochs must be at least 0"),
    (OptimConfig, {"lr_sch": "cosine"}, "lr_sch must be one of inverse_sqrt_nowarmup, const"),
    (OptimConfig, {"sch_params": (0,)}, "sch_params must be one number greater than 0"),
    (OptimConfig, {"sch_params": (1, 2)}, "sch_params must be one number greater than 0"),
    (OptimConfig, {"normalize_targets": "std"}, "normalize_targets must be one of"),
    (ScaleConfig, {"num_workers": 0}, "num_workers must be at least 1"),
    (ScaleConfig, {"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
    (ScaleConfig, {"precision": "fp16"}, "precision must be one of fp32, bf16"),
    (ScaleConfig, {"device": "tpu"}, "device must be one of auto, cpu, cuda"),
    (ScaleConfig, {"deepspeed": ""}, "deepspeed must be the path"),
    (ScaleConfig, {"cpus_per_worker": 0}, "cpus_per_worker must be greater than 0"),
    (ScaleConfig, {"threads_per_worker": 0}, "threads_per_worker must be at least 1"),
    (ScaleConfig, {"backend": "jax"}, "backend must be one of"),
    (ScaleConfig, {"max_failures": -1}, "max_failures must be at least 0"),
    (ScaleConfig, {"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
    (ScaleConfig, {"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
    (RunConfig, {"storage_path": ""}, "storage_path must be"),
    (RunConfig, {"seed": -1}, "seed must be from 0"),
    (RunConfig, {"seed": 2**32}, "seed must be from 0"),
    (RunConfig, {"resume": True}, "run_name must be given where resume is true"),
    (RunConfig, {"auto_resume": True}, "run_name must be given where auto_resume is true"),
    (RunConfig, {"auto_resume": True, "resume": True, "run_name": "a"}, "auto_resume must be false where resume is"),
    (RunConfig, {"deterministic": "yes"}, "deterministic must be true or false, got 'yes'"),
]


@pytest.mark.parametrize(("section", "values", "message"), WRONG)
def test_wrong_values_are_refused_by_name(section, values, message):
    with pytest.raises(ValueError, match=message):
        section(**values)


@pytest.mark.parametrize(
    "name", ["", "/abs", "..", "a/../b", "a//b", "a/", "-a", "a b", "a\\b", ".hidden", "é", "a" * 201]
)
def test_run_name_must_be_plain_folder_names(name):
    with pytest.raises(ValueError, match="run_name must be a folder name"):
        RunConfig(run_name=name)


@pytest.mark.parametrize(
    "name", ["a" * 200, "demo", "demo/e_form", "shear-elastic_tensor_2015-20260101-120000", "lr=0.1,k=64"]
)
def test_run_name_may_have_parts(name):
    assert RunConfig(run_name=name).run_name == name


def test_every_worker_and_part_needs_a_crystal():
    with pytest.raises(ValueError, match=r"batch_size must be at least num_workers \* gradient_accumulation = 6"):
        config_of(batch_size=5, num_workers=3, gradient_accumulation=2)
    assert config_of(batch_size=6, num_workers=3, gradient_accumulation=2).data.batch_size == 6


def test_triton_needs_a_gpu():
    with pytest.raises(ValueError, match="backend must be auto, torch or reference where device is cpu"):
        config_of(backend="triton", device="cpu")


def test_numba_is_for_the_cpu():
    with pytest.raises(ValueError, match="backend must be auto, torch or reference where device is cuda"):
        config_of(backend="numba", device="cuda")
    assert config_of(backend="numba", device="cpu").scale.backend == "numba"


@pytest.mark.parametrize("backend", ["numba", "triton"])
def test_compiled_kernels_have_no_reciprocal_space(backend):
    with pytest.raises(ValueError, match="backend must be auto, torch or reference where domain is multihead"):
        config_of(backend=backend, domain="multihead")


def test_number_of_targets_follows_from_the_targets():
    assert config_of(target=["shear", "bulk"]).model.num_targets == 2
    built = TrainConfig(data=DataConfig(target=("shear", "bulk", "n")), model=ModelConfig(num_targets=1))
    assert built.model.num_targets == 3
    with pytest.raises(ValueError, match="num_targets cannot be set"):
        config_of(num_targets=2)


def test_values_are_read_kindly():
    config = config_of(lr="1e-4", weight_decay=0, scale_real=2, adam_betas=[0, 0.5], embedding_dim=64)
    assert (config.optim.lr, config.optim.weight_decay) == (1e-4, 0.0)
    assert isinstance(config.optim.weight_decay, float)
    assert (config.model.scale_real, config.model.embedding_dim) == ((2.0,), (64,))
    assert config_of(target="shear,bulk").data.target == ("shear", "bulk")


def test_flat_values_give_the_config_back():
    config = config_of(target=["shear", "bulk"], lr=1e-3, scale_real=[1.0, 1.8], run_name="a/b", dataset="x")
    flat = config.to_flat()
    assert set(flat) == set(flat_fields())
    assert TrainConfig.from_flat(flat) == config


def test_target_must_be_given():
    with pytest.raises(ValueError, match="target must be given"):
        TrainConfig.from_flat({})


def test_unknown_settings_are_refused_with_the_closest():
    with pytest.raises(ValueError, match="unknown setting 'model_dmi'; did you mean model_dim?"):
        config_of(model_dmi=3)
    with pytest.raises(ValueError, match="unknown setting 'zzzzzz'$"):
        config_of(zzzzzz=3)


def test_the_authors_spellings():
    config = TrainConfig.from_flat(
        {"target_set": "d", "targets": "e_form", "n_epochs": 7, "save_path": "s", "experiment_name": "x/y"}
    )
    assert (config.data.dataset, config.data.target, config.optim.epochs) == ("d", ("e_form",), 7)
    assert (config.run.storage_path, config.run.run_name) == ("s", "x/y")
    with pytest.raises(ValueError, match="epochs is given twice, also as n_epochs"):
        config_of(epochs=1, n_epochs=1)


def test_resolved_names_the_run():
    config = config_of()
    named = config.resolved(dataset="d", target=("shear", "bulk"), now=datetime(2026, 1, 2, 3, 4, 5))
    assert (named.data.dataset, named.model.num_targets) == ("d", 2)
    assert named.run.run_name == "shear+bulk-d-20260102-030405"
    strange = config.resolved(dataset="d", target=("Δe",), now=datetime(2026, 1, 2, 3, 4, 5))
    assert strange.run.run_name == "_e-d-20260102-030405"
    many = config.resolved(dataset="d" * 190, target=tuple(f"target{i}" for i in range(30)), now=datetime(2026, 1, 2))
    assert many.run.run_name == f"{'+'.join(many.data.target)[:80]}...-{'d' * 80}...-20260102-000000"
    kept = replace(config, run=RunConfig(run_name="mine"))
    assert kept.resolved(dataset="d", target=("shear",), now=datetime(2026, 1, 2)).run.run_name == "mine"


def test_yaml_gives_the_same_run(tmp_path):
    config = config_of(lr=1e-5, normalize_targets="no", scale_real=[1.0, 1.8], run_name="2026-01-01", resume=True)
    path = tmp_path / "run" / "config.yaml"
    save_yaml(path, config)
    assert "resume" not in path.read_text(encoding="utf-8")
    assert load_yaml(path) == replace(config, run=replace(config.run, resume=False))


WRONG_FILES = [
    ("target: shear\nmodel_dmi: 3", "unknown setting 'model_dmi'; did you mean model_dim?"),
    ("target: shear\nlr: 1\nlr: 2", "line 3: lr is given twice"),
    ("target: shear\nepochs: many", "epochs must be an integer, got 'many'"),
    ("target: shear\nepochs: '3'", "epochs must be an integer, got '3'"),
    ("target: shear\nlr: -1", "lr must be greater than 0, got -1.0"),
    ("target: {a: 1}", "target must be one or more names"),
    ("- target", "must hold lines of `name: value`, got list"),
    ("target: [", "line 1"),
    ("1: 2", "line 1: 1 is not the name of a setting"),
    ("lr: 1", "target must be given"),
    ("target: shear\nepochs: !!int abc", "invalid literal for int()"),
    ("target: " + 3000 * "[", "recursion"),
    ("target: !!python/object:os.system x", "line 1: could not determine a constructor"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_FILES)
def test_wrong_files_are_refused_by_file_and_line(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_missing_or_binary_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no\.yaml: No such file"):
        load_yaml(tmp_path / "no.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"b\.yaml: not a text file"):
        load_yaml(tmp_path / "b.yaml")


def test_yaml_words_stay_words(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("target: shear\nnormalize_targets: no\nrun_name: 2026-01-01\nlr: 1e-4\n", encoding="utf-8")
    assert load_flat(path) == {
        "target": ("shear",),
        "normalize_targets": "no",
        "run_name": "2026-01-01",
        "lr": 1e-4,
    }


@pytest.mark.parametrize(
    ("epochs", "swa", "averaged"), [(100, 50, 50), (50, 50, 25), (10, 50, 5), (1, 50, 0), (9, 0, 0)]
)
def test_the_epochs_whose_weights_are_averaged(epochs, swa, averaged):
    assert OptimConfig(epochs=epochs, swa_epochs=swa).averaged_epochs == averaged
