"""What people read: lines and a bar as trials end, the table, the page; also where there is little to tell."""

import io
from datetime import datetime

import optuna
import pytest

from tune.book import TrialRecord, best, records
from tune.folder import new_search
from tune.progress import SearchProgress
from tune.report import summary, table_of, write_report, write_trials
from tune.study import open_storage

UNIT = "log10(GPa)"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def trial(number, value=None, state="complete", **others):
    settings = {"scale_real": 1.25 + number, "optimizer": "adam"}
    facts = {"epochs": 3, "best_epoch": 2, "seconds": 61.4, "process": "host 1", "reason": "", "search": "s"}
    return TrialRecord(number=number, value=value, state=state, settings=settings, **(facts | others))


TRIALS = [
    trial(0, 0.25),
    trial(1, 0.125, "stopped early"),
    trial(2, 0.0625, "failed", reason="diverged: <nan>"),
    trial(3, None, "unfinished", epochs=0, seconds=None),
]


@pytest.fixture
def plan(tmp_path):
    settings = {"target": ["shear"], "storage_path": str(tmp_path), "run_name": "s"}
    return new_search(settings, {"num_trials": 4, "storage": f"sqlite:///{tmp_path}/study.db"}, datetime(2026, 1, 2))


def test_the_best_is_no_failed_trial():
    assert best(TRIALS).number == 1
    assert best(TRIALS[2:]) is None


def test_the_table_has_the_best_first_and_those_without_value_last(plan):
    lines = table_of(plan, TRIALS, UNIT).splitlines()
    assert "val MAE shear" in lines[0] and UNIT in lines[1]
    rows = [line.split() for line in lines[3:]]
    assert [row[0] for row in rows] == ["1", "0", "2", "3"]
    assert rows[0] == ["1", "0.1250", "3", "61", "s", "stopped", "early", "2.25", "adam"]
    shared = table_of(plan, [*TRIALS, trial(4, 0.5, search="other")], UNIT)
    assert "other" in shared


@pytest.mark.parametrize(("unit", "shown"), [(UNIT, f" [{UNIT}]"), ("1", ""), ("", "")])
def test_the_unit_stands_with_every_heading_and_nothing_where_there_is_none(plan, unit, shown):
    write_trials(plan, TRIALS, unit)
    assert (plan.folder / "trials.csv").read_text().startswith(f"number,search,state,val_mae_shear{shown},epochs")
    write_report(plan, optuna.create_study(), TRIALS, unit)
    page = (plan.folder / "report.html").read_text()
    assert f"<th>val MAE{shown}</th>" in page
    assert f"Best: trial 1, validation MAE shear{shown} 0.1250 in epoch 2." in page


def test_the_end_is_told_with_reasons_and_the_command(plan):
    lines = summary(plan, TRIALS, UNIT)
    assert "trial 2 failed: diverged: <nan>" in lines
    assert "best trial  1: validation MAE shear 0.1250 log10(GPa) in epoch 2" in lines
    assert "settings    --scale_real 2.25 --optimizer adam" in lines
    assert lines[-1].startswith("train it    crystalformer train --config ")
    assert summary(plan, TRIALS[2:], UNIT)[-1] == "best trial  none: no trial has a value"


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_progress_on_a_terminal_and_elsewhere(plan, kind):
    stream = kind()
    with SearchProgress(plan, UNIT, stream) as progress:
        progress.begin(1, 2)
        progress.ended(TRIALS[2], TRIALS)
        progress.ended(TRIALS[0], TRIALS)
        progress.data(29, 3)
    text = stream.getvalue()
    assert "search of shear on elastic_tensor_2015: 4 trials of up to 10 epochs, 2 at once, 1 done before" in text
    assert "trial 2  val MAE 0.0625 log10(GPa)  failed, epoch 3  61 s  scale_real 3.25  optimizer adam" in text
    assert "(diverged: <nan>)" in text
    assert "neighbour lists found for 3 of 29 trials" in text
    assert ("best 0.1250 log10(GPa), trial 1" in text) == (kind is Terminal)


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_units_and_reasons_are_shown_and_not_obeyed(plan, kind):
    stream = kind()
    with SearchProgress(plan, "\x07eV", stream) as progress:
        progress.ended(trial(0, 0.25, reason="\x9b2J\nerror: forged"), TRIALS)
    text = stream.getvalue()
    assert r"val MAE 0.2500 \x07eV" in text and r"(\x9b2J\nerror: forged)" in text
    assert "\x07" not in text and "\x9b" not in text
    assert (r"best 0.1250 \x07eV, trial 1" in text) == (kind is Terminal)


def test_a_search_without_a_value_has_a_page_that_says_so(plan):
    study = optuna.create_study(storage=open_storage(plan.url), study_name="s")
    number = study.ask().number
    study.tell(number, state=optuna.trial.TrialState.FAIL)
    write_report(plan, study, records(study, plan.space), UNIT)
    page = (plan.folder / "report.html").read_text()
    assert page.count("Not drawn: no trial has a value.") == 4
    assert not list(plan.folder.glob("*.png"))
    assert not (plan.folder / "best.yaml").exists()
    assert (plan.folder / "trials.csv").read_text().splitlines()[1].startswith("0,,failed,,0,")
