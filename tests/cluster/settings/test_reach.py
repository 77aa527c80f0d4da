"""Models whose attention reaches farther than is computed are refused wherever one is read."""

import json
from dataclasses import replace

import pytest

from cluster.cli import main
from cluster.errors import UserError
from cluster.settings.reach import check_reach
from crystalformer import ModelConfig
from tests.cluster.trained import write_model

FAR = [
    ({"scale_real": [20.0]}, "the reach of attention, must be at most 100 Å, got 169.7 Å"),
    ({"domain": "reci", "scale_reci": [0.1]}, "the reach in reciprocal space, must be at most 20 1/Å, got 84.85 1/Å"),
]


@pytest.mark.parametrize(("settings", "message"), FAR)
def test_both_spaces_have_an_end(settings, message):
    check_reach(ModelConfig())
    with pytest.raises(UserError, match=message):
        check_reach(replace(ModelConfig(), **settings))


@pytest.mark.parametrize("command", ["predict", "evaluate", "convert"])
def test_a_model_folder_that_asks_for_more_is_refused(command, tmp_path, capsys):
    model = write_model(tmp_path / "model")
    card = json.loads((model / "config.json").read_text())
    card["model"]["scale_real"] = 1000.0
    (model / "config.json").write_text(json.dumps(card))
    more = {"predict": ["x.cif"], "evaluate": [], "convert": [str(tmp_path / "x.ckpt"), "--to_reference"]}[command]
    assert main([command, str(model), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {model / 'config.json'}: cutoff_sigmas * scale_real") and error.count("\n") == 1
