"""The search space: what a YAML file may say, what is refused before the start, and what is suggested."""

import re
from pathlib import Path

import optuna
import pytest

from cluster.errors import UserError
from cluster.settings.config import TrainConfig
from tune.space import DEFAULT, load_space, read_space

README = Path(__file__).resolve().parents[2] / "README.md"
BASE = TrainConfig.from_flat({"target": ["shear"]})

GOOD = """
scale_real: {log: [0.5, 3.5]}
gauss_lb_real: {uniform: [0.1, 0.9]}
value_pe_dist_real: {integer: [0, 256], step: 16}
num_layers: {log: [1, 8]}
optimizer: {choice: [adamw, adam]}
embedding_dim: {choice: [128, [64, 64]]}
weight_decay: {log: [1e-6, 1e-2], when: {optimizer: adamw}}
domain: {choice: [real, reci, real-reci]}
scale_reci: {uniform: [1.0, 4.0], when: {domain: [reci, real-reci]}}
"""


def write(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return str(path)


def draws(space, count=60):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    found = []
    for _ in range(count):
        trial = study.ask()
        found.append(space.settings(space.suggest(trial)))
        study.tell(trial, 0.0)
    return found


def test_the_default_space_is_the_papers_three():
    space = load_space(None, BASE)
    assert space.rules() == DEFAULT
    for settings in draws(space):
        assert list(settings) == ["scale_real", "gauss_lb_real", "value_pe_dist_real"]
        assert 0.5 <= settings["scale_real"] <= 3.5
        assert 0.1 <= settings["gauss_lb_real"] <= 0.9
        assert settings["value_pe_dist_real"] in range(0, 257, 16)
    assert (
        sum(settings["scale_real"] < 1.32 for settings in draws(space)) > 20
    )  # log: half lie below the mean of logs


def test_every_kind_of_rule_is_followed_and_makes_a_config(tmp_path):
    space = load_space(write(tmp_path, GOOD), BASE)
    found = draws(space)
    for settings in found:
        config = TrainConfig.from_flat(BASE.to_flat() | settings)
        assert 1 <= config.model.num_layers <= 8
        assert ("weight_decay" in settings) == (settings["optimizer"] == "adamw")
        assert ("scale_reci" in settings) == (settings["domain"] in ("reci", "real-reci"))
    assert {config["optimizer"] for config in found} == {"adamw", "adam"}
    assert {str(config["embedding_dim"]) for config in found} == {"128", "[64, 64]"}
    assert {"scale_reci" in config for config in found} == {True, False}


def test_the_space_of_the_readme_is_read(tmp_path):
    (text,) = re.findall(r"^```yaml\n(# space.yaml\n.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    space = load_space(write(tmp_path, text), BASE)
    assert list(space.rules()) == ["scale_real", "gauss_lb_real", "value_pe_dist_real", "optimizer", "weight_decay"]


def test_settings_as_given_are_found_in_the_space_or_not(tmp_path):
    space = load_space(write(tmp_path, GOOD), BASE)
    chosen = space.given(BASE.to_flat())
    assert chosen["scale_real"] == 1.4
    assert chosen["embedding_dim"] == 128
    assert "scale_reci" not in chosen
    assert space.given(BASE.to_flat() | {"scale_real": [5.0]}) is None
    assert space.given(BASE.to_flat() | {"value_pe_dist_real": 8}) is None


def test_what_goes_only_together_is_allowed():
    from tune.space import check_values

    check_values(read_space({"model_dim": {"choice": [96, 128]}, "head_num": {"choice": [3, 8]}}), BASE)
    with pytest.raises(ValueError, match="head_num must be a divisor of model_dim=128, got 3"):
        check_values(read_space({"head_num": {"choice": [3, 8]}}), BASE)


WRONG = [
    ("", "names no setting to search"),
    ("scale_rael: {uniform: [1, 2]}", "unknown setting 'scale_rael'; did you mean scale_real?"),
    ("scale_real: 2", "scale_real must be a rule such as {uniform: [LOW, HIGH]}, got 2"),
    ("scale_real: {unifrom: [1, 2]}", "scale_real: unknown word 'unifrom'; did you mean uniform?"),
    ("scale_real: {step: 2}", "scale_real must have one of uniform, log, integer, choice, got none"),
    (
        "scale_real: {uniform: [1, 2], log: [1, 2]}",
        "must have one of uniform, log, integer, choice, got uniform, log",
    ),
    ("scale_real: {uniform: [2, 1]}", "scale_real: uniform must have LOW below HIGH, got [2, 1]"),
    ("scale_real: {uniform: 2}", "scale_real: uniform must be [LOW, HIGH], got 2"),
    ("scale_real: {log: [0, 1]}", "scale_real: log must have LOW above 0, got [0, 1]"),
    ("scale_real: {uniform: [-1, 2]}", "scale_real: scale_real must be greater than 0 (Å), got -1.0"),
    ("scale_real: {uniform: [wide, 2]}", "scale_real: uniform: scale_real must be one or more numbers, got 'wide'"),
    ("gauss_lb_real: {uniform: [0.1, 1.5]}", "gauss_lb_real must be between 0 and 1, both excluded, got 1.5"),
    ("value_pe_dist_real: {integer: [0, 250], step: 16}", "step must lead from 0 to 250, got 16"),
    ("value_pe_dist_real: {integer: [0, 256]}", "value_pe_dist_real must be 0 or a multiple of 16, got 1"),
    ("value_pe_dist_real: {integer: [0, 40], step: 8}", "value_pe_dist_real must be 0 or a multiple of 16, got 40"),
    ("num_layers: {uniform: [1, 4]}", "num_layers takes integers; use integer instead of uniform"),
    ("num_layers: {integer: [1, 2.5]}", "num_layers: integer: num_layers must be an integer, got 2.5"),
    ("scale_real: {integer: [1, 4]}", "scale_real takes any number; use uniform or log instead of integer"),
    ("scale_real: {uniform: [1, 4], step: 1}", "scale_real: step goes with integer, not with uniform"),
    ("optimizer: {uniform: [1, 4]}", "optimizer has no numbers to range over; use choice"),
    ("optimizer: {choice: [adamw, sgd]}", "optimizer must be one of adamw, adam, got 'sgd'"),
    ("optimizer: {choice: []}", "optimizer: choice must be a list of values"),
    ("optimizer: {choice: [adam, adam]}", "optimizer: choice gives a value twice"),
    ("epochs: {integer: [1, 9]}", "epochs cannot be searched: early stopping decides it"),
    ("num_workers: {integer: [1, 9]}", "num_workers cannot be searched: it says where or on what a run works"),
    ("lr: {log: [1e-4, 1e-2], when: {optimizer: adamw}}", "lr: when names 'optimizer', which is not searched before"),
    (
        "optimizer: {choice: [adam]}\nlr: {log: [1e-4, 1e-2], when: {optimizer: adamw}}",
        "lr: when: optimizer is never 'adamw'",
    ),
    ("lr: {log: [1e-4, 1e-2], when: adamw}", "lr: when must name one earlier setting and its value, got 'adamw'"),
    (
        "optimizer: {choice: [adam, adamw]}\nlr: {log: [1e-4, 1e-2], when: {optimizer: adamw, num_layers: 4}}",
        "lr: when must name one earlier setting and its value, got {'optimizer': 'adamw', 'num_layers': 4}",
    ),
    ("lr: {log: [1e-4, 1e-2]}\nlr: {log: [1e-4, 1e-2]}", "line 2: lr is given twice"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_wrong_space_is_told_in_one_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_space(path, BASE)
    assert message in str(caught.value)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_the_combinations_of_a_space_are_counted_where_they_have_an_end():
    rules = {"optimizer": {"choice": ["adamw", "adam"]}, "num_layers": {"integer": [2, 6], "step": 2}}
    when = {"norm_type": {"choice": ["no", "bn"], "when": {"optimizer": "adam"}}}
    assert len(list(read_space(rules).combinations())) == 6
    found = list(read_space(rules | when).combinations())
    assert len(found) == 3 + 6
    assert {"optimizer": "adamw", "num_layers": 4} in found
    assert read_space(rules | {"lr": {"log": [1e-4, 1e-3]}}).combinations() is None
