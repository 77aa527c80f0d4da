"""Pictures: they are written, and show what they are told."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from cluster.prediction.plots import plot_curves, plot_parity

UNITS = {"shear": "log10(GPa)", "n": "1"}
ROWS = [{"epoch": e, "train_loss": 1 / e, "val_mae": {"shear": 0.1 + 1 / e, "n": None}} for e in range(1, 5)]


def dark_pixels(path):
    return int((imread(path)[..., :3].min(axis=-1) < 0.5).sum())


def test_parity_has_a_panel_a_target(tmp_path):
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(50, 2))
    path = tmp_path / "new" / "parity.png"
    plot_parity(path, ["shear", "n"], UNITS, truth, truth + 0.1)
    height, width = imread(path).shape[:2]
    assert width > 1.8 * height
    full = dark_pixels(path)
    truth[:, 1] = np.nan
    plot_parity(path, ["shear", "n"], UNITS, truth, truth)
    assert dark_pixels(path) < full
    assert [p.name for p in path.parent.iterdir()] == ["parity.png"]


def test_two_that_draw_one_picture_do_not_meet(tmp_path, monkeypatch):
    """The second begins and ends where the first has written its file and not renamed it yet."""
    rename, told = Path.replace, (tmp_path / "parity.png", ["n"], UNITS, np.ones((5, 1)), np.ones((5, 1)))

    def beset(partial, path):
        monkeypatch.setattr(Path, "replace", rename)
        plot_parity(*told)
        return rename(partial, path)

    monkeypatch.setattr(Path, "replace", beset)
    plot_parity(*told)
    assert [p.name for p in tmp_path.iterdir()] == ["parity.png"]


def test_parity_of_one_crystal_and_of_a_constant(tmp_path):
    plot_parity(tmp_path / "a.png", ["shear"], UNITS, np.ones((1, 1)), np.ones((1, 1)))
    assert dark_pixels(tmp_path / "a.png") > 100


def test_parity_must_fit_its_names(tmp_path):
    with pytest.raises(ValueError, match=r"truth and prediction must be \(n, 1\), got \(3, 2\)"):
        plot_parity(tmp_path / "a.png", ["shear"], UNITS, np.zeros((3, 2)), np.zeros((3, 2)))


def test_curves_have_a_panel_for_the_loss_and_each_target(tmp_path):
    path = tmp_path / "curves.png"
    plot_curves(path, ROWS, UNITS)
    height, width = imread(path).shape[:2]
    assert width > 2.8 * height
    plain = imread(path)
    plot_curves(path, ROWS, UNITS, swa_from=3)
    assert not np.array_equal(plain, imread(path))


def test_curves_of_nothing_yet(tmp_path):
    plot_curves(tmp_path / "curves.png", [], UNITS, swa_from=3)
    assert dark_pixels(tmp_path / "curves.png") > 100


def test_dollars_in_names_and_units_are_no_formula(tmp_path):
    names, units = ["a$b$", r"v$\nothing$"], {"a$b$": r"$\angstrom^3$", r"v$\nothing$": "$"}
    plot_parity(tmp_path / "parity.png", names, units, np.ones((3, 2)), np.zeros((3, 2)))
    row = {"epoch": 1, "train_loss": 1.0, "val_mae": dict.fromkeys(names, 0.1)}
    plot_curves(tmp_path / "curves.png", [row], units)
    assert len(list(tmp_path.iterdir())) == 2
