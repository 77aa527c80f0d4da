"""The crystalformer command as a user meets it: help, exit status, one line for mistakes. Nothing here starts Ray."""

import os
import subprocess
import sys
import time

import pytest

from cluster import cli
from cluster.cli import main
from cluster.commands import MODULES
from cluster.commands.train import find_data, summary
from cluster.settings.config import TrainConfig, load_yaml, save_yaml
from data_pipeline.errors import DataError
from tests.cluster.run.test_report import RESULT


def failure(capsys, *words) -> str:
    """The one line on stderr of a command line that must fail with status 2 and say nothing else."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.strip()


def in_process(*words):
    return subprocess.run([sys.executable, "-m", "cluster", *words], capture_output=True, text=True, timeout=240)


def test_help_lists_the_commands_that_there_are(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        for name in MODULES:
            assert f"\n    {name} " in text


@pytest.mark.parametrize("name", MODULES)
def test_every_command_has_help(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: crystalformer {name}")
    assert "--debug" in text


def test_help_comes_at_once_and_loads_nothing_heavy():
    code = (
        "import sys; from cluster.cli import main; main(['--help']); "
        "sys.exit(bool({'torch', 'ray', 'numpy', 'pyarrow', 'pymatgen'} & set(sys.modules)))"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 5  # 0.05 s on an idle machine; importing torch and Ray takes several


def test_python_m_cluster_is_the_same_command():
    done = in_process("train", "--lr", "x", "--target", "shear")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: lr must be a number, got 'x'\n")


def test_what_the_locale_cannot_show_is_escaped():
    """Half of the commands' help has a length in Å."""
    command = [sys.executable, "-m", "cluster", "train", "--help"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=240)
    assert done.returncode == 0, done.stderr
    assert rb"(\xc5; default 1.4)" in done.stdout


def test_debug_shows_where_an_error_arose():
    for words in (["--debug", "train", "--lr", "x"], ["train", "--lr", "x", "--debug"]):
        done = in_process(*words)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert "lr must be a number" in done.stderr


TOO_LONG = "x" * 300
"""As a folder that may not be entered, a path that cannot be looked at; root may enter all of them."""

MISTAKES = [
    (["trian"], "invalid choice: 'trian' (choose from"),
    (["--verbose"], "unknown option --verbose"),
    (["train"], "target must be given"),
    (["train", "--target"], "argument --target: expected at least one argument"),
    (["train", "--target", "shaer"], "unknown target 'shaer'"),
    (["train", "--target", "shear", "--dataset", "nowhere"], "data set 'nowhere' is neither registered nor prepared"),
    (["train", "--target", "shear", "--dataset", "flla_2015"], "data set flla_2015 has no target 'shear'"),
    (["train", "--target", "shear,shear_modulus"], "target 'shear' is named twice"),
    (["train", "--target", "shear", "--foo", "3"], "unknown option --foo"),
    (["train", "--target", "shear", "--model-dmi", "3"], "unknown option --model_dmi; did you mean --model_dim?"),
    (["train", "--target", "shear", "--scale_real", "-1.0"], "scale_real must be greater than 0 (Å), got -1.0"),
    (
        ["train", "--target", "shear", "--value_pe_dist_real", "50"],
        "value_pe_dist_real must be 0 or a multiple of 16",
    ),
    (["train", "--target", "shear", "--head_num", "7"], "head_num must be a divisor of model_dim=128, got 7"),
    (["train", "--target", "shear", "--num_workers", "200"], "batch_size must be at least num_workers"),
    (["train", "--target", "shear", "--deepspeed", "no.json"], "deepspeed: no.json: No such file"),
    (["train", "--target", "shear", "--config", "no.yaml"], "no.yaml: No such file"),
    (["prepare", "nowhere"], "unknown data set 'nowhere'"),
    (["prepare"], "give DATASET, or --source PATH and --name NAME"),
    (["info", "nowhere"], "unknown data set 'nowhere'"),
    (["info", "flla_2015", "extra"], "unexpected argument 'extra'"),
    (["train", "--target", "shear", "--storage_path", TOO_LONG], f"{TOO_LONG}: File name too long"),
    (["train", "--target", "shear", "--data_dir", TOO_LONG], "File name too long"),
    (["info", TOO_LONG], f"{TOO_LONG}/config.json: File name too long"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(capsys, words, message):
    assert message in failure(capsys, *words)


def test_mistakes_are_found_before_ray_is_loaded():
    code = (
        "import sys; from cluster.cli import main; status = main(['train', '--target', 'shaer']); "
        "sys.exit(100 if {'ray', 'deepspeed'} & set(sys.modules) else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 2, done.stderr


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Makes ``crystalformer try`` run a given function, from a module of its own."""

    def install(body: str) -> None:
        (tmp_path / "try_command.py").write_text(
            f"HELP = 'try'\ndef add_arguments(parser): pass\ndef run(args):\n    {body}\n", encoding="utf-8"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "try_command", raising=False)
        monkeypatch.setitem(cli.MODULES, "try", "try_command")

    return install


def test_an_interrupt_is_one_line_and_status_130(command, capsys):
    command("raise KeyboardInterrupt")
    assert main(["try"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_our_own_mistakes_keep_their_traceback(command):
    command("raise ValueError('ours')")
    with pytest.raises(ValueError, match="ours"):
        main(["try"])


def test_an_error_of_several_lines_becomes_one(command, capsys):
    command("from cluster.errors import UserError; raise UserError('a\\n  b')")
    assert failure(capsys, "try") == "error: a b"


@pytest.mark.parametrize("words", [["info"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(words):
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    with process.stderr as stderr:
        assert stderr.read() == ""
    assert process.wait(timeout=60) == 0


def test_the_data_are_found_under_their_own_names(tmp_path):
    config = find_data(TrainConfig.from_flat({"target": "shear_modulus", "data_dir": str(tmp_path)}))
    assert (config.data.dataset, config.data.target) == ("elastic_tensor_2015", ("shear",))
    assert config.run.run_name.startswith("shear-elastic_tensor_2015-20")
    save_yaml(tmp_path / "config.yaml", config)
    assert load_yaml(tmp_path / "config.yaml") == config
    with pytest.raises(DataError, match="unknown target"):
        find_data(TrainConfig.from_flat({"target": "hardness"}))


def test_the_summary_names_folder_errors_and_time():
    assert summary(RESULT) == [
        "run folder  runs/a",
        "test MAE    shear 0.2000 log10(GPa) (best validation, epoch 2 weights)",
        "time        0:00:02",
    ]


def test_info_lists_the_data_sets_and_describes_one(capsys, tmp_path):
    assert main(["info", "--data_dir", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "shear [log10(GPa)], bulk [log10(GPa)]" in listed
    assert "bandgap [eV], n\n" in listed and "[1]" not in listed
    assert main(["info", "elastic_tensor_2015", "--data-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "train 944, val 118, test 118" in text
    assert "prepared   no; crystalformer prepare elastic_tensor_2015" in text
    assert "CC BY 4.0" in text


def test_prepare_makes_a_data_set_that_info_then_describes(capsys, tmp_path):
    words = ["dielectric_2017", "--data_dir", str(tmp_path)]
    assert main(["prepare", *words, "--strict"]) == 0
    answer = capsys.readouterr().out
    assert f"prepared  {tmp_path / 'dielectric_2017'}" in answer
    assert "dielectric_2017: 844 train, 105 val, 105 test; targets bandgap [eV]" in answer
    assert main(["prepare", *words]) == 0
    assert answer.endswith(capsys.readouterr().out)
    assert main(["info", *words]) == 0
    assert capsys.readouterr().out.startswith("dielectric_2017: 844 train, 105 val, 105 test\n")
