"""The run that a command goes on with: it need not be told again what the run knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import UserError
from cluster.run.storage import RunStore
from cluster.settings.config import CONFIG_FILE, load_flat
from cluster.settings.sections import RunConfig

_OF_THE_COMMAND = ("run_name", "storage_path", "resume", "auto_resume")
"""Where the run is, and that it is gone on with."""


def saved_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of the run that ``given`` says to resume, by flat name; none where it says no such thing.

    ValueError where that is not said well; UserError where there is no such run, unless auto_resume is to begin it,
    or where its folder or its config.yaml cannot be read.
    """
    calling = RunConfig(**{name: given[name] for name in _OF_THE_COMMAND if name in given})
    if calling.run_name is None or not (calling.resume or calling.auto_resume):
        return {}
    with RunStore(calling.storage_path, calling.run_name) as store:
        if not store.holds(CONFIG_FILE):
            if calling.auto_resume:
                return {}
            raise not_there(calling.run_name, store)
        store.pull(CONFIG_FILE)
        saved = load_flat(store.folder / CONFIG_FILE)
    return {name: value for name, value in saved.items() if name not in _OF_THE_COMMAND}


def not_there(name: str, store: RunStore) -> UserError:
    """What is said where there is nothing to resume."""
    return UserError(f"run_name {name!r} cannot be resumed: {store.location} holds no {CONFIG_FILE}")
