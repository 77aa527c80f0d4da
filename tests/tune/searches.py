"""A search that was begun before, as its folder and its study hold it."""

import optuna

from tune.book import records
from tune.folder import saved_search
from tune.study import open_storage


def saved(folder, name, **given):
    return saved_search({"run_name": name, "storage_path": str(folder), "resume": True}, given)


def trials_of(plan):
    """The trials in the study of a search."""
    return records(optuna.load_study(study_name=plan.study_name, storage=open_storage(plan.url)), plan.space)
