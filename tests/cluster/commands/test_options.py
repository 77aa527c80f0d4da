"""Every setting as a flag: spelling, types, precedence, help and what is said of mistakes."""

from dataclasses import replace

import pytest

from cluster.commands.options import add_config_options, add_data_dir, add_device, read_config, read_settings
from cluster.commands.parser import Parser, normalize
from cluster.errors import UserError
from cluster.settings.config import ALIASES, TrainConfig, flat_fields, save_yaml
from cluster.settings.fields import coerce
from cluster.settings.workers import WorkerRange


def parse(*words):
    parser = Parser(prog="test")
    add_config_options(parser)
    args, unknown = parser.parse_known_args(normalize(words))
    if unknown:
        parser.refuse(unknown)
    return args


def config_of(*words) -> TrainConfig:
    return read_config(parse("--target", "shear", *words))


def help_text() -> str:
    parser = Parser(prog="test")
    add_config_options(parser)
    return " ".join(parser.format_help().split())


def test_no_flag_leaves_the_defaults():
    assert read_config(parse("--target", "shear")) == TrainConfig.from_flat({"target": "shear"})
    assert read_settings(parse()) == {}


def test_every_setting_can_be_given_as_the_config_has_it():
    for name, value in TrainConfig.from_flat({"target": ["a", "b"]}).to_flat().items():
        items = value if isinstance(value, list) else [value]
        words = ["none" if item is None else str(item).lower() if item is True else str(item) for item in items]
        given = read_settings(parse(f"--{name}", *words))
        assert given == {name: coerce(flat_fields()[name], value)}, name


@pytest.mark.parametrize("flag", ["--model_dim", "--model-dim"])
def test_dash_and_underscore_are_the_same(flag):
    assert config_of(flag, "64").model.model_dim == 64
    assert config_of(f"{flag}=64").model.model_dim == 64


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--scale_real", "1.0", "1.8"], "scale_real", (1.0, 1.8)),
        (["--scale_real", "1.0,1.8"], "scale_real", (1.0, 1.8)),
        (["--target", "shear,bulk"], "target", ("shear", "bulk")),
        (["--target", "shear", "bulk"], "target", ("shear", "bulk")),
        (["--value_pe_dist_max", "-5.0"], "value_pe_dist_max", -5.0),
        (["--value_pe_dist_max", "-5e-1"], "value_pe_dist_max", -0.5),
        (["--value_pe_dist_max=-1e1"], "value_pe_dist_max", -10.0),
        (["--value_pe_headed", "false"], "value_pe_headed", False),
        (["--value_pe_headed", "True"], "value_pe_headed", True),
        (["--resume"], "resume", True),
        (["--resume", "--lr", "1"], "resume", True),
        (["--deterministic=false"], "deterministic", False),
        (["--threads_per_worker", "none"], "threads_per_worker", None),
        (["--epochs", "3", "--epochs", "4"], "epochs", 4),
        (["--run_name", "-5"], "run_name", "-5"),
        (["--num_workers", "3"], "num_workers", WorkerRange(3, 3)),
        (["--num_workers", "1-4"], "num_workers", WorkerRange(1, 4)),
    ],
)
def test_words_become_values(words, name, value):
    assert read_settings(parse(*words))[name] == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "x"], "epochs must be an integer, got 'x'"),
        (["--num_workers", "4-1"], "num_workers must be at least 1, a range from the fewest to the most, got '4-1'"),
        (["--num_workers", "x"], "num_workers must be a number of workers or a range of them such as 1-4, got 'x'"),
        (["--epochs", "1.5"], "epochs must be an integer, got '1.5'"),
        (["--lr", "-nan"], "lr must be a number, got '-nan'"),
        (["--scale_real", "-1.0"], "scale_real must be greater than 0"),
        (["--value_pe_dist_real", "50"], "value_pe_dist_real must be 0 or a multiple of 16, got 50"),
        (["--head_num", "7"], "head_num must be a divisor of model_dim=128, got 7"),
        (["--domain", "imaginary"], "domain must be one of real, reci"),
        (["--value_pe_headed", "maybe"], "value_pe_headed must be true or false, got 'maybe'"),
        (["--epochs"], "argument --epochs: expected 1 argument"),
        (["--epoch", "3"], "unknown option --epoch; did you mean --epochs"),
        (["--model-dmi=3"], "unknown option --model_dmi; did you mean --model_dim"),
        (["--zzzz"], "unknown option --zzzz; test --help lists the options"),
        (["-x"], "unknown option -x"),
        (["--epochs", "3", "stray"], "unexpected argument 'stray'"),
        (["--num_targets", "2"], "unknown option --num_targets"),
        (["--targets", "bulk"], "target is given twice, also as targets"),
        (["--config", "no-such.yaml"], "no-such.yaml: No such file"),
    ],
)
def test_mistakes_are_one_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        config_of(*words)
    assert "\n" not in str(caught.value)


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    save_yaml(path, config_of("--lr", "1e-3", "--epochs", "7", "--run_name", "x"))
    config = read_config(parse("--config", str(path), "--n_epochs", "9", "--target", "bulk"))
    assert (config.optim.lr, config.optim.epochs, config.run.run_name) == (1e-3, 9, "x")
    assert config.data.target == ("bulk",)


def test_the_authors_training_command():
    words = """--save_path result --n_epochs 500 --experiment_name demo --num_layers 4 --value_pe_dist_real 64
    --target_set jarvis__megnet-shear --targets shear --batch_size 128 --lr 0.0005 --model_dim 128
    --embedding_dim 128""".split()
    config = read_config(parse(*words))
    assert (config.run.storage_path, config.run.run_name, config.optim.epochs) == ("result", "demo", 500)
    assert (config.data.dataset, config.data.target) == ("jarvis__megnet-shear", ("shear",))


def test_help_states_meaning_unit_default_and_alias_of_every_setting():
    text = help_text()
    for name, spec in flat_fields().items():
        assert f"--{name} " in text
        assert " ".join(spec.help.split()) in text
    assert (
        "r_0: width of the real-space Gaussians; several: layer l takes number l mod count (Å; default 1.4)" in text
    )
    assert "(epochs; default 100; also --n_epochs)" in text
    assert "default 0.9 0.98" in text
    for alias in ALIASES:
        assert f"also --{alias})" in text


def test_options_of_other_commands_are_those_of_a_run():
    parser = Parser(prog="x")
    add_data_dir(parser)
    add_device(parser)
    args, specs = parser.parse_args([]), flat_fields()
    assert (args.data_dir, args.device) == (specs["data_dir"].default, specs["device"].default)
    for device in specs["device"].choices:
        assert parser.parse_args(["--device", device]).device == device
    with pytest.raises(UserError, match="tpu"):
        parser.parse_args(["--device", "tpu"])


def test_normalize_leaves_values_and_the_rest_alone():
    assert normalize(["--a-b", "c-d", "-3", "-x", "--", "--e-f", "-3"]) == [
        "--a_b",
        "c-d",
        " -3",
        "-x",
        "--",
        "--e-f",
        "-3",
    ]


def test_what_a_resumed_run_knows_need_not_be_given_again(tmp_path):
    begun = config_of("--run_name", "night", "--lr", "1e-3", "--num_workers", "2", "--storage_path", str(tmp_path))
    (tmp_path / "night").mkdir()
    save_yaml(tmp_path / "night" / "config.yaml", begun)
    words = ["--run_name", "night", "--storage_path", str(tmp_path)]
    for word in ("--resume", "--auto_resume"):
        again = read_config(parse(*words, word))
        assert (again.run.resume, again.run.auto_resume) == (word == "--resume", word == "--auto_resume")
        assert replace(again, run=begun.run) == begun
    given = read_config(parse(*words, "--resume", "--num_workers", "3", "--lr", "2e-3"))
    assert (given.scale.num_workers.most, given.optim.lr) == (3, 2e-3), "which the run refuses, or not"
    with pytest.raises(UserError, match="^target must be given"):
        read_config(parse(*words))
    with pytest.raises(UserError, match="^run_name 'other' cannot be resumed: .*/other holds no config.yaml"):
        read_config(parse("--run_name", "other", "--storage_path", str(tmp_path), "--resume"))
    with pytest.raises(UserError, match="^target must be given"):
        read_config(parse("--run_name", "other", "--storage_path", str(tmp_path), "--auto_resume"))
    with pytest.raises(UserError, match="^run_name must be given where resume is true"):
        read_config(parse("--storage_path", str(tmp_path), "--resume"))
