"""A search's run folder: ``runs/tune-…/``, opened, locked against a second process, and read again on --resume.

config.yaml holds the settings of the trials but for what is searched, search.yaml the rest, and both are what the
search was begun with; a database's address is kept without user and password.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from cluster import lock
from cluster.driver.run_folder import MAY_CHANGE as RUN_MAY_CHANGE
from cluster.errors import UserError, without_credentials
from cluster.files import dump_yaml, read_yaml, write_text
from cluster.run.report import METRICS_FILE
from cluster.settings.config import CONFIG_FILE, SECTIONS, TrainConfig, flat_fields, load_flat, save_yaml
from cluster.settings.deepspeed_config import overlay_of
from cluster.settings.sections import made_name
from data_pipeline.errors import DataError
from tune.config import MAY_CHANGE, OF_TRIALS, SearchConfig
from tune.space import Space, check_values, load_space, read_space
from tune.study import VARIABLE, is_own_file, shown_url, storage_url

SEARCH_FILE = "search.yaml"
BEST_FILE = "best.yaml"
TRIALS_FOLDER = "trials"
RULES = "rules"
"""Key of search.yaml for the space itself: the file it was read from may change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A search that is ready to begin or to go on."""

    config: TrainConfig
    """Settings of a trial, but for what is searched; resolved, ``epochs`` being a trial's."""
    options: SearchConfig
    space: Space
    folder: Path
    url: str
    """Of the study's database; may hold a password."""

    @property
    def root(self) -> Path:
        """storage_path, whole: the folder that run_name, which may be of several parts, begins in."""
        return Path(self.config.run.storage_path).resolve()

    @property
    def name(self) -> str:
        """run_name: what tells this search's trials from others' in a shared study."""
        return str(self.config.run.run_name)

    @property
    def study_name(self) -> str:
        """Of the study."""
        return self.options.study_name or self.name

    @property
    def objective(self) -> str:
        """The target whose error is minimized."""
        return self.options.objective or self.config.data.target[0]


def new_search(settings: Mapping[str, Any], given: Mapping[str, Any], now: datetime) -> Search:
    """A search from the settings of its trials and its own, by flat name. UserError names what is wrong."""
    from data_pipeline.datasets import resolve

    if settings.get("init_from") is not None:
        raise UserError(f"init_from must be none in a search, whose trials begin anew, got {settings['init_from']!r}")
    try:
        options = SearchConfig.from_flat(_with_those_of_trials(settings, given))
        config = TrainConfig.from_flat({**settings, "epochs": options.epochs})
    except ValueError as error:
        raise UserError(str(error)) from error
    found = resolve(config.data.dataset, config.data.target, Path(config.data.data_dir))
    name = f"tune-{made_name(found.target_names, found.name, now)}"
    config = replace(config, run=replace(config.run, run_name=config.run.run_name or name))
    config = config.resolved(dataset=found.name, target=found.target_names, now=now)
    if options.objective is not None:
        options = replace(options, objective=_own_target(options.objective, config))
    space = load_space(options.space, config)
    return _search(config, options, space)


def _own_target(objective: str, config: TrainConfig) -> str:
    """The data set's own name of a target that may be spelt as the authors do."""
    from data_pipeline.datasets import resolve

    if objective in config.data.target:
        return objective
    try:
        return resolve(config.data.dataset, (objective,), Path(config.data.data_dir)).target_names[0]
    except DataError:  # told with the names of those that are learnt
        return objective


def _with_those_of_trials(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The search's own settings, with those that stood among a training run's, as in a file."""
    return dict(given) | {name: settings[name] for name in OF_TRIALS if name in settings}


def _search(config: TrainConfig, options: SearchConfig, space: Space) -> Search:
    if "://" in config.run.storage_path:
        raise UserError(
            f"storage_path of a search must be a folder that all nodes share, got "
            f"{without_credentials(config.run.storage_path)!r}"
        )
    folder = Path(config.run.storage_path).resolve() / str(config.run.run_name)
    url = storage_url(options, folder)
    shown_url(url)
    overlay_of(config)  # a file that cannot be used would cost every trial
    search = Search(config=config, options=options, space=space, folder=folder, url=url)
    if search.objective not in config.data.target:
        targets = ", ".join(config.data.target)
        raise UserError(f"objective must be one of the targets {targets}, got {search.objective!r}")
    return search


def saved_search(settings: Mapping[str, Any], given: Mapping[str, Any]) -> Search:
    """The search of ``run_name`` as it was begun, with what may change as given anew.

    UserError where there is none, where something else differs, or where its database is not named again.
    """
    if settings.get("run_name") is None:
        raise UserError("run_name must be given where resume is true: the search to go on with")
    folder = _folder_of(settings)
    if not (folder / SEARCH_FILE).is_file():
        raise UserError(f"run_name {settings['run_name']!r} cannot be resumed: {folder} holds no {SEARCH_FILE}")
    flat, saved = load_flat(folder / CONFIG_FILE), read_yaml(folder / SEARCH_FILE)
    rules, place = saved.pop(RULES), saved.pop("storage")
    given = _with_those_of_trials(settings, given)
    _check_same(_own_names(settings, flat), flat, RUN_MAY_CHANGE)
    if given.get("objective") is not None:
        given["objective"] = _own_target(given["objective"], TrainConfig.from_flat(flat))
    _check_same(given, saved, MAY_CHANGE)
    keep = {"storage_path": str(_root_of(settings)), "run_name": str(settings["run_name"])}
    try:
        config = TrainConfig.from_flat(flat | {k: v for k, v in settings.items() if k in RUN_MAY_CHANGE} | keep)
        options = SearchConfig.from_flat(saved | {k: v for k, v in given.items() if k in MAY_CHANGE})
        space = read_space(rules)
        check_values(space, config)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    search = _search(config, options, space)
    now = None if is_own_file(search.url, search.folder) else shown_url(search.url)
    if now != place:
        where = place or "its own folder"
        raise UserError(
            f"the search's study is in {where}; name it with --storage or {VARIABLE}"
            if place
            else f"the search's study is in {where}: leave out --storage and unset {VARIABLE}"
        )
    return search


def _folder_of(settings: Mapping[str, Any]) -> Path:
    """Where the search of run_name lies."""
    return _root_of(settings) / str(settings.get("run_name"))


def _root_of(settings: Mapping[str, Any]) -> Path:
    """The folder of runs, by settings that need not name a storage_path."""
    return Path(settings.get("storage_path", flat_fields()["storage_path"].default)).resolve()


def _own_names(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the data set and targets, where they are given, under the names the search was begun with."""
    from data_pipeline.datasets import resolve

    given = {name: settings[name] for name in ("dataset", "target") if settings.get(name) is not None}
    if not given:
        return dict(settings)
    data_dir = Path(settings.get("data_dir", saved["data_dir"]))
    found = resolve(given.get("dataset", saved["dataset"]), given.get("target", saved["target"]), data_dir)
    return {**settings, "dataset": found.name, "target": found.target_names}


def _check_same(given: Mapping[str, Any], saved: Mapping[str, Any], may_change: frozenset[str]) -> None:
    for name, value in given.items():
        plain = list(value) if isinstance(value, tuple) else value
        was = saved.get(name)
        was = list(was) if isinstance(was, tuple) else was
        if name not in may_change and name in saved and was != plain:
            raise UserError(f"{name} is {plain!r} but the search to resume was started with {was!r}")


def check_calling(settings: Mapping[str, Any]) -> None:
    """UserError where resume, auto_resume and run_name do not go together; the rules are those of a run."""
    calling = {name: settings[name] for name in ("run_name", "resume", "auto_resume") if name in settings}
    try:
        SECTIONS["run"](**calling)
    except ValueError as error:
        raise UserError(str(error)) from error


def is_there(settings: Mapping[str, Any]) -> bool:
    """Whether the search of run_name was begun before."""
    return (_folder_of(settings) / SEARCH_FILE).is_file()


def has_begun(search: Search) -> bool:
    """Whether ``begin`` has been called for it."""
    return (search.folder / SEARCH_FILE).is_file()


def refuse_taken(search: Search) -> None:
    """UserError where the folder of a new search is another's, or a run's, which has metrics.jsonl."""
    if any((search.folder / name).exists() for name in (SEARCH_FILE, METRICS_FILE)):
        raise UserError(f"run_name {search.name!r} exists in {search.root}; give another, or --resume")


def begin(search: Search) -> None:
    """Write what a new search is begun with. It is checked by then: what is written here cannot be corrected."""
    # search.yaml is written last: without it a search that was killed here has not begun.
    place = None if is_own_file(search.url, search.folder) else shown_url(search.url)
    values = search.options.to_flat() | {"storage": place, RULES: search.space.rules()}
    try:
        save_yaml(search.folder / CONFIG_FILE, search.config)
        write_text(search.folder / SEARCH_FILE, dump_yaml(values))
    except OSError as error:
        raise UserError(
            f"storage_path {search.config.run.storage_path!r} cannot be written: {error.strerror}"
        ) from error


@contextmanager
def locked(folder: Path, *, patient: bool = False) -> Iterator[None]:
    """Within, no other process goes on with this search; a process that dies lets go. UserError where one does.

    ``patient``: a search that goes on by itself waits for the file server to notice that its last process is gone.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(lock.claimed(folder / ".lock", patient=patient))
        except lock.InUseError as error:
            raise UserError(f"{folder} is in use: another process goes on with this search") from error
        except OSError as error:
            raise UserError(f"{folder} cannot be locked: {error.strerror}") from error
        yield
