"""evaluate: its numbers are those of definitions written out here (in test_training.py: those of results.json)."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from cluster.cli import main
from cluster.commands.evaluate import summary
from cluster.prediction.inputs import find_structures
from cluster.prediction.predict import load_predictor, pick_device
from cluster.prediction.scoring import Scored, errors_of, mae_by_element, mae_by_size, score_split, worst
from data_pipeline.composition import amounts_of
from tests.cluster.trained import SCALES, write_model

CPU = pick_device("cpu")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Where pictures are drawn."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder as a run on elastic_tensor_2015 leaves one; how well it predicts plays no part here."""
    scales = [replace(scale, unit="log10(GPa)") for scale in SCALES]
    return write_model(tmp_path_factory.mktemp("model") / "model", scales=scales, dataset="elastic_tensor_2015")


def test_predictions_do_not_depend_on_the_batch_size(model, elastic):
    predictor = load_predictor(model, CPU)
    one, other = (
        score_split(predictor, CPU, "elastic_tensor_2015", "val", elastic.path.parent, size) for size in (7, 128)
    )
    assert one.ids == other.ids
    np.testing.assert_allclose(one.prediction, other.prediction, rtol=1e-5)


@pytest.fixture
def scored():
    generator = np.random.default_rng(0)
    truth = generator.normal(size=(40, 2))
    prediction = truth + generator.normal(size=(40, 2))
    sizes = np.array([1, 4, 5, 8, 9, 64, 65, 200] * 5)
    elements = generator.random((40, 99)) < 0.05
    elements[:, 0] = False
    return Scored(
        dataset="d",
        ids=[str(i) for i in range(40)],
        sizes=sizes,
        elements=elements,
        truth=truth,
        prediction=prediction,
    )


def test_errors_follow_their_definitions(scored):
    truth, prediction = scored.truth[:, 1], scored.prediction[:, 1]
    errors = errors_of(truth, prediction)
    assert errors.mae == pytest.approx(mean_absolute_error(truth, prediction))
    assert errors.rmse == pytest.approx(root_mean_squared_error(truth, prediction))
    assert errors.r2 == pytest.approx(r2_score(truth, prediction))
    assert np.isnan(errors_of(np.ones(3), np.zeros(3)).r2)


def test_the_worst_come_first(scored):
    residual = np.abs(scored.prediction[:, 0] - scored.truth[:, 0])
    rows = worst(scored, 0, 5)
    assert residual[rows].tolist() == sorted(residual, reverse=True)[:5]


def test_an_id_is_shown_and_not_obeyed(scored):
    hostile = replace(scored, ids=["m\x1b[2J\nerror: forged"] * 40)
    lines = summary(hostile, 0, SCALES[0])
    assert r"  worst     m\x1b[2J\nerror: forged: " in lines[4]
    assert all(line.isprintable() for line in lines)


def test_errors_by_cell_size(scored):
    found = mae_by_size(scored, 0)
    assert [(name, count) for name, count, _ in found] == [
        ("1 to 4", 10),
        ("5 to 8", 10),
        ("9 to 16", 5),
        ("33 to 64", 5),
        ("65 and more", 10),
    ]
    residual = np.abs(scored.prediction[:, 0] - scored.truth[:, 0])
    assert found[0][2] == pytest.approx(residual[scored.sizes <= 4].mean())
    assert sum(count * mae for _, count, mae in found) == pytest.approx(residual.sum())


def test_errors_by_element(scored):
    found = mae_by_element(scored, 1)
    errors = [mae for _, _, mae in found]
    assert errors == sorted(errors, reverse=True)
    residual = np.abs(scored.prediction[:, 1] - scored.truth[:, 1])
    by_symbol = {symbol: (count, mae) for symbol, count, mae in found}
    assert len(by_symbol) == scored.elements.any(0).sum()
    with_iron = scored.elements[:, 26]
    assert by_symbol["Fe"] == (with_iron.sum(), pytest.approx(residual[with_iron].mean()))


def test_the_elements_of_a_split_are_those_of_its_formulas(model, elastic):
    predictor = load_predictor(model, CPU)
    scored = score_split(predictor, CPU, "elastic_tensor_2015", "test", elastic.path.parent)
    for row, crystal in enumerate(find_structures([str(elastic.split_path("test"))])):
        assert set(np.flatnonzero(scored.elements[row])) == set(amounts_of(crystal.crystal)), scored.ids[row]


def test_the_picture(model, elastic, tmp_path, capsys):
    words = ["evaluate", str(model), "--data_dir", str(elastic.path.parent), "--split", "val"]
    assert main([*words, "--plot", str(tmp_path / "new" / "parity.png")]) == 0
    assert (tmp_path / "new" / "parity.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.endswith(f"plot      {tmp_path / 'new' / 'parity.png'}\n")
    assert main([*words, "--no-plot"]) == 0
    assert "plot" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_picture_is_drawn_unless_told_otherwise(model, elastic, tmp_path, monkeypatch, capsys):
    """In this folder, in a Ray job where it lasts; where it cannot be written, the numbers are there still."""
    words = ["evaluate", str(model), "--data_dir", str(elastic.path.parent), "--split", "val"]
    name = "parity-elastic_tensor_2015-val.png"
    assert main(words) == 0
    told = capsys.readouterr().out
    assert told.endswith(f"\nplot      {name}\n") and (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setenv("CRYSTALFORMER_HOME", str(tmp_path / "home"))
    assert main(words) == 0
    assert capsys.readouterr().out.endswith(f"\nplot      {tmp_path / 'home' / name}\n")
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("CRYSTALFORMER_HOME", str(tmp_path / "taken"))
    assert main(words) == 0
    answer = capsys.readouterr()
    assert answer.out == told[: told.index("\nplot ")]
    assert answer.err.splitlines()[-1].startswith(f"warning: no plot: {tmp_path / 'taken' / name}: ")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("parity.xyz", "must end in one of ."),
        ("parity", "must end in one of ."),
        ("folder.png", "Is a directory"),
        ("taken/parity.png", "Not a directory"),
    ],
)
def test_a_picture_that_cannot_be_written_is_told_before_the_work(
    file, message, model, tmp_path, monkeypatch, capsys
):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr("cluster.prediction.scoring.score_split", None)
    assert main(["evaluate", str(model), "--plot", file]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --plot {file}: {message}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("dataset", "fingerprint", "warned"),
    [
        ("elastic_tensor_2015", "0" * 64, True),
        ("elastic_tensor_2015", None, False),
        ("another", "0" * 64, False),
    ],
    ids=["other rows", "the same rows", "another data set"],
)
def test_rows_that_may_have_been_trained_on_are_warned_of(dataset, fingerprint, warned, elastic, tmp_path, capsys):
    """As where a set was prepared again with another seed: what is now its test split was partly trained on."""
    scales = [replace(scale, unit="log10(GPa)") for scale in SCALES]
    origin = {"dataset": dataset, "dataset_fingerprint": fingerprint or elastic.fingerprint}
    model = write_model(tmp_path / "model", scales=scales, **origin)
    words = ["evaluate", str(model), "--dataset", "elastic_tensor_2015", "--data_dir", str(elastic.path.parent)]
    assert main(words) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(told) == warned
    if warned:
        assert "elastic_tensor_2015 was prepared anew since the model was trained on it (000000000000 is" in told[0]
        assert "the test split may hold structures it was trained on" in told[0]


MISTAKES = [
    ([], "--dataset is needed"),
    (["--dataset", "nowhere"], "data set 'nowhere' is neither registered nor prepared"),
    (["--dataset", "flla_2015"], "shear"),
    (["--dataset", "elastic_tensor_2015"], "has bulk in log10(GPa), but the model predicts GPa"),
    (["--split", "all"], "invalid choice: 'all'"),
    (["--plot", "a.png", "--no-plot"], "argument --no_plot: not allowed with argument --plot"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_line_and_status_2(words, message, tmp_path, capsys):
    model = write_model(tmp_path / "model")
    assert main(["evaluate", str(model), *words, "--data_dir", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
