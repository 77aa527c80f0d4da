"""The study: repeatable suggestions, early stopping, failures, going on after a kill, sharing, no secrets shown."""

import random
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest

from cluster.errors import RunFailed, UserError
from cluster.settings.config import TrainConfig
from tune.book import Book, best, exhausted, kept_errors, records
from tune.config import SearchConfig
from tune.space import DEFAULT, read_space
from tune.study import (
    PURPOSE,
    VARIABLE,
    Purpose,
    SeededTPE,
    is_own_file,
    open_storage,
    open_study,
    reason_of,
    refuse_known,
    shown_url,
    storage_url,
)

SPACE = read_space(DEFAULT)
BASE = TrainConfig.from_flat({"target": ["shear"]}).to_flat()


def purpose(**others):
    common = {"dataset": "d", "targets": ("shear",), "objective": "shear", "unit": "1", "epochs": 9, "space": DEFAULT}
    return Purpose(**(common | {"fixed": {"lr": 0.1}, "grace_epochs": 1, "reduction": 3} | others))


def begin(url, name="s", *, sharing=True, seed=1, **others):
    config = SearchConfig(search_seed=seed, grace_epochs=1, reduction=3)
    return open_study(open_storage(url), name, config, purpose(**others), sharing=sharing)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path}/study.db"


def make_book(study, limit, search="mine", space=SPACE, refuse=lambda _: None, **others):
    told = []
    return Book(study, space, BASE, search, limit, refuse, told.append, **others), told


def error_of(settings):
    """A made-up error with its minimum at the paper's defaults."""
    return abs(settings["scale_real"] - 1.4) + abs(settings["gauss_lb_real"] - 0.5)


def run(book, epochs=3, until=1000):
    """Run suggestions, one after another; those left after ``until`` stay under way."""
    found = []
    while len(found) < until and (suggestion := book.next()) is not None:
        found.append(suggestion)
        errors = []
        for epoch in range(1, epochs + 1):
            errors.append(error_of(suggestion.settings) * (1 + 1 / epoch))
            if epoch == epochs:
                book.epochs_done(suggestion.number, errors)
                book.complete(suggestion.number)
            elif not book.epochs_done(suggestion.number, errors):
                book.stop(suggestion.number)
                break
    return found


def test_the_same_seed_suggests_the_same_and_another_does_not(tmp_path):
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        book, _ = make_book(begin(f"sqlite:///{tmp_path}/{name}.db", seed=seed), 14)
        found.append([suggestion.settings for suggestion in run(book)])
    assert found[0] == found[1]
    assert not any(settings in found[0] for settings in found[2])


def test_a_killed_search_goes_on_as_if_it_had_not_been(tmp_path):
    book, _ = make_book(begin(f"sqlite:///{tmp_path}/whole.db"), 14)
    whole = [suggestion.settings for suggestion in run(book)]

    url = f"sqlite:///{tmp_path}/killed.db"
    book, _ = make_book(begin(url), 14)
    run(book, until=11)
    cut_off = book.next()
    book.epochs_done(cut_off.number, [1.0])
    again, _ = make_book(begin(url), 14)
    assert again.ended_trials == 11
    rest = run(again)
    assert [suggestion.number for suggestion in rest] == [11, 12, 13]
    assert rest[0] == cut_off
    trials = records(begin(url), SPACE)
    assert [trial.settings for trial in trials] == whole
    assert all(trial.ended for trial in trials)
    assert again.next() is None


def test_a_trial_whose_search_was_killed_before_signing_it_is_taken_up(url):
    study = begin(url)
    orphan = study.ask().number
    shared, _ = make_book(study, 1, search="other")
    assert shared.next().number != orphan  # it may be another search's, about to sign
    book, _ = make_book(study, 2, alone=True)
    assert [suggestion.number for suggestion in run(book)][0] == orphan
    assert records(study, SPACE)[orphan].search == "mine"


def test_random_numbers_do_not_depend_on_what_was_drawn_before():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=SeededTPE(5))
    first = [study.ask().suggest_float("x", 0, 1) for _ in range(3)]
    random.seed(1)
    other = optuna.create_study(sampler=SeededTPE(5))
    other.ask()
    assert other.ask().suggest_float("x", 0, 1) == first[1]


def test_worse_trials_stop_early_and_the_best_is_found(url):
    study = begin(url)
    book, told = make_book(study, 30)
    run(book, epochs=9)
    trials = records(study, SPACE)
    states = [trial.state for trial in trials]
    assert set(states) == {"complete", "stopped early"}
    assert states.count("stopped early") > 10
    assert best(trials).value == min(trial.value for trial in trials)
    assert best(trials).value < 0.3
    assert {trial.epochs for trial in trials if trial.state == "stopped early"} <= {1, 3}
    assert [trial.number for trial in told] == list(range(30))
    assert all(trial.epochs == 9 for trial in trials if trial.state == "complete")


def test_the_value_is_the_smallest_error_so_far_and_nan_is_none(url):
    study = begin(url)
    book, _ = make_book(study, 2)
    first = book.next().number
    book.epochs_done(first, [0.5, 0.2, 0.4])
    book.complete(first)
    second = book.next().number
    book.epochs_done(second, [0.1, float("nan")])
    book.fail(second, "diverged: validation MAE is nan\nin epoch 2")
    one, two = records(study, SPACE)
    assert (one.value, one.best_epoch, one.epochs) == (0.2, 2, 3)
    assert (two.state, two.value, two.reason) == ("failed", 0.1, "diverged: validation MAE is nan in epoch 2")
    assert best([one, two]) == one
    assert study.best_trial.number == first


def test_with_scores_the_value_is_the_error_in_the_epoch_of_the_smallest(url):
    study = begin(url)
    book, _ = make_book(study, 1)
    number = book.next().number
    errors, scores = [0.5, 0.2, 0.4, 0.3], [0.9, 0.8, 0.6, 0.7]
    for epoch in range(1, 5):
        book.epochs_done(number, errors[:epoch], scores[:epoch])
    book.complete(number)
    (trial,) = records(study, SPACE)
    assert (trial.value, trial.best_epoch, trial.epochs) == (0.4, 3, 4)
    assert study.best_value == 0.4
    assert kept_errors([0.5, 0.4], [0.9, float("nan")]) == [0.5]


def test_a_bad_combination_is_recorded_and_the_search_goes_on(url):
    space = read_space({"model_dim": {"choice": [96, 128]}, "head_num": {"choice": [3, 8]}})
    study = begin(url, space={})

    def refuse(config):
        return "not run: too wide" if config.model.model_dim == 96 else None

    book, _ = make_book(study, 12, space=space, refuse=refuse)
    ran = []
    while (suggestion := book.next()) is not None:
        ran.append(suggestion.settings)
        book.epochs_done(suggestion.number, [1.0])
        book.complete(suggestion.number)
    trials = records(study, space)
    assert len({tuple(trial.settings.values()) for trial in trials}) == 4
    failed = [trial for trial in trials if trial.state == "failed"]
    assert failed and all("head_num must be a divisor of model_dim=128, got 3" in trial.reason for trial in failed)
    wide = [trial for trial in trials if trial.state == "stopped early"]
    assert wide and all(trial.reason == "not run: too wide" for trial in wide)
    assert ran and all(settings == {"model_dim": 128, "head_num": 8} for settings in ran)


def test_no_settings_are_trained_twice_and_a_finite_space_has_an_end(url):
    space = read_space({"optimizer": {"choice": ["adamw", "adam"]}, "num_layers": {"integer": [2, 6], "step": 2}})
    study = begin(url, space={})
    book, told = make_book(study, 60, space=space)
    ran = []
    while (suggestion := book.next()) is not None:
        ran.append(suggestion)
        assert not book.over or len(ran) == 6
        for epoch in (1, 2):
            book.epochs_done(suggestion.number, [1 / suggestion.settings["num_layers"], 0.1][:epoch])
        book.complete(suggestion.number)
    assert len({tuple(suggestion.settings.values()) for suggestion in ran}) == len(ran) == 6
    assert book.over and exhausted(study, space)
    assert told[-1].number == ran[-1].number and len(told) < 60
    repeated = [trial for trial in told if trial.number not in {suggestion.number for suggestion in ran}]
    assert repeated
    for trial in repeated:
        other = told[int(trial.reason.removeprefix("same settings as trial "))]
        assert (trial.state, trial.settings) == ("stopped early", other.settings)
        assert (trial.value, trial.epochs, trial.best_epoch) == (other.value, 2, 2)
    assert best(told).number == ran[0].number
    assert make_book(study, 61, space=space, search="another")[0].next() is None


def test_a_trial_that_was_cut_off_ends_before_a_finite_space_does(url):
    space = read_space({"num_layers": {"choice": [2, 4]}})
    study = begin(url, space={})
    book, _ = make_book(study, 9, space=space)
    numbers = []
    while (suggestion := book.next()) is not None:
        numbers.append(suggestion.number)
    assert exhausted(study, space) and len(numbers) < 9
    again, _ = make_book(begin(url, space={}), 9, space=space)
    assert not again.over
    assert [again.next().number for _ in numbers] == numbers
    assert again.next() is None


def test_what_is_under_way_when_the_book_is_closed_stays_so(url):
    study = begin(url)
    book, told = make_book(study, 3)
    number = book.next().number
    book.epochs_done(number, [0.3])
    book.close()
    book.complete(number)
    assert not book.epochs_done(number, [0.3, 0.2])
    assert book.next() is None
    (trial,) = records(study, SPACE)
    assert (trial.state, trial.epochs, told) == ("unfinished", 1, [])


def test_what_would_fail_every_trial_ends_the_search_and_none_of_them(url):
    study = begin(url)
    book, told = make_book(study, 3)
    first, second = book.next().number, book.next().number
    book.epochs_done(first, [0.3])
    book.give_up(second, "/data: No space left on device")
    book.fail(first, "its process died")
    hint = "go on with --run_name mine --resume"
    assert isinstance(book.problem, RunFailed)
    assert str(book.problem) == f"trial 1 cannot go on, nor could another: /data: No space left on device; {hint}"
    assert book.next() is None and not told
    assert [trial.state for trial in records(study, SPACE)] == ["unfinished", "unfinished"]
    again, _ = make_book(begin(url), 3)
    assert [again.next().number for _ in range(3)] == [0, 1, 2]


# Storage ----------------------------------------------------------------------------------------------------------


def test_searches_share_a_study_only_if_they_ask_for_it_and_agree(url):
    begin(url, sharing=False)
    with pytest.raises(UserError, match="study_name 's' exists in this storage"):
        begin(url, sharing=False)
    for others, message in [
        ({"dataset": "e"}, "dataset 'd', now it is 'e'"),
        ({"epochs": 10}, "epochs 9, now it is 10"),
        ({"fixed": {"lr": 0.2}}, "lr 0.1, now it is 0.2"),
        ({"space": {"lr": {"log": [1, 2]}}}, "begun with lr None, now it is"),
        ({"grace_epochs": 2}, "grace_epochs 1, now it is 2"),
        ({"reduction": 4}, "reduction 3, now it is 4"),
    ]:
        with pytest.raises(UserError, match=message):
            begin(url, **others)


def test_a_study_of_an_earlier_version_is_gone_on_with(url):
    earlier = purpose().to_dict()
    del earlier["grace_epochs"], earlier["reduction"]
    begin(url).set_user_attr(PURPOSE, earlier)
    assert begin(url, grace_epochs=2).study_name == "s"
    with pytest.raises(UserError, match="dataset 'd', now it is 'e'"):
        begin(url, dataset="e")


def test_a_new_search_does_not_take_the_trials_of_one_of_its_name(url):
    study = begin(url)
    make_book(study, 1, search="mine")[0].next()
    refuse_known(study, "other")
    with pytest.raises(UserError, match="run_name 'mine' has trials in study 's'; give another"):
        refuse_known(study, "mine")


def test_searches_begun_at_once_on_a_fresh_database_make_its_tables_together(tmp_path):
    for number in range(4):
        url = f"sqlite:///{tmp_path}/fresh{number}.db"
        with ThreadPoolExecutor(4) as pool:
            assert len([storage for storage in pool.map(open_storage, [url] * 4) if storage]) == 4


@pytest.mark.parametrize("name", ["plain", "a%20b", "why?", "50% {SCHEMA_VERSION} #1 ä"])
def test_a_study_of_its_own_lies_in_the_run_folder_whatever_that_is_called(tmp_path, monkeypatch, name):
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = tmp_path / name
    folder.mkdir()
    url = storage_url(SearchConfig(), folder)
    assert is_own_file(url, folder)
    assert shown_url(url) == f"sqlite:///{folder}/study.db"
    begin(url).ask()
    assert (folder / "study.db").is_file() and [path.name for path in tmp_path.iterdir()] == [name]
    assert len(begin(url).trials) == 1


def test_no_user_or_password_is_shown():
    assert shown_url("postgresql://me:secret@host:5433/runs?sslmode=no") == "postgresql://host:5433/runs"
    assert shown_url("sqlite:////tmp/a.db") == "sqlite:////tmp/a.db"
    for url in ("postgresql://me:se@cret:word@db.host/runs", "postgresql://me:secret@[::1/db", "secret@host/db"):
        with pytest.raises(UserError, match="^storage must be a database URL such as [^ ]+$") as caught:
            shown_url(url)
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
    with pytest.raises(ValueError, match=r"got '\*\*\*'"):
        SearchConfig(storage="me:secret@host/db")


def test_a_driver_that_repeats_the_url_tells_no_password():
    error = RuntimeError("no answer from postgresql://me:any%40file@host/db: is any@file right?")
    assert reason_of(error, "postgresql://me:any%40file@host/db") == (
        "no answer from postgresql://***@host/db: is *** right?"
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("nonsense://x", "storage nonsense:///x cannot be opened|storage nonsense://x/ cannot be opened"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
        ("postgresql://me:secret@127.0.0.1:1/x", "storage postgresql://127.0.0.1:1/x cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_told_in_a_line(bad, message):
    with pytest.raises(UserError, match=message) as caught:
        open_storage(bad)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
