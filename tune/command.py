"""``crystalformer tune``."""

from __future__ import annotations

import argparse
from datetime import datetime
from typing import Any

HELP = "search for the settings with the smallest validation error"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The search's own options, then the settings of a training run that are left, but for ``init_from``."""
    from cluster.commands.options import add_config_options, add_options
    from cluster.settings.fields import specs_of
    from tune.config import OF_TRIALS, SearchConfig

    add_options(parser.add_argument_group("search"), specs_of(SearchConfig))
    add_config_options(parser, without=(*OF_TRIALS, "init_from"))


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked without Ray, search, and say what was found."""
    from cluster.commands.options import read_settings

    settings = read_settings(args)
    given = _given(args)
    from tune.folder import check_calling, is_there, new_search, saved_search  # Optuna takes a second to import

    check_calling(settings)
    by_itself = bool(settings.get("auto_resume"))
    again = bool(settings.get("resume")) or (by_itself and is_there(settings))
    settings = {name: value for name, value in settings.items() if name != "auto_resume"} | {"resume": again}
    plan = saved_search(settings, given) if again else new_search(settings, given, datetime.now())
    from cluster.log import say
    from tune.report import summary
    from tune.search import search  # Ray takes seconds to import

    result = search(plan, patient=by_itself)
    say("\n".join(summary(plan, result.trials, result.unit)))
    if not result.finished:
        say(f"unfinished  the time was up; go on with --run_name {plan.name} --resume")
    elif len([trial for trial in result.trials if trial.search == plan.name]) < plan.options.num_trials:
        say("finished    every combination of the space has been tried")


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The search's own options that were given, each of the right type. UserError."""
    from cluster.errors import UserError
    from cluster.settings.fields import parse_words, specs_of
    from tune.config import SearchConfig

    found: dict[str, Any] = {}
    try:
        for spec in specs_of(SearchConfig):
            if hasattr(args, spec.name):
                words = getattr(args, spec.name)
                found[spec.name] = parse_words(spec, [words] if isinstance(words, str) else words)
    except ValueError as error:
        raise UserError(str(error)) from error
    return found
