"""Command-line options from the config dataclasses: every setting is a flag, flags win over a --config file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from cluster.errors import UserError
from cluster.paths import LASTING, lasting
from cluster.settings.config import (
    ALIASES,
    SECTIONS,
    TrainConfig,
    canonical_names,
    flat_fields,
    load_flat,
    section_fields,
)
from cluster.settings.fields import FieldSpec, Required, parse_words
from cluster.settings.sections import Device
from cluster.settings.workers import WorkerRange

_TITLES = {
    "model": "model",
    "data": "data",
    "optim": "optimization",
    "scale": "workers and hardware",
    "run": "run",
}
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false", WorkerRange: "N|N-M"}


def add_config_options(
    parser: argparse.ArgumentParser, sections: Sequence[str] = tuple(SECTIONS), *, without: Sequence[str] = ()
) -> None:
    """Add --config and a flag for every setting of the sections, with the authors' spellings, in groups."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=None,
        help="YAML file of settings (a run's config.yaml); flags win over it",
    )
    parser.usage = "%(prog)s [options]"
    spellings = {name: alias for alias, name in ALIASES.items()}
    for section in sections:
        group = parser.add_argument_group(_TITLES[section])
        add_options(group, [spec for spec in section_fields(section) if spec.name not in without], spellings)


def add_options(
    group: argparse._ArgumentGroup, specs: Iterable[FieldSpec], spellings: Mapping[str, str] | None = None
) -> None:
    """A flag for every setting, and one more for each that has another spelling."""
    for spec in specs:
        alias = (spellings or {}).get(spec.name)
        _add_flag(group, spec.name, spec, _help_text(spec, alias))
        if alias is not None:
            _add_flag(group, alias, spec, argparse.SUPPRESS)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """The option for the folder of prepared data sets, as a training run has it."""
    spec = flat_fields()["data_dir"]
    parser.add_argument(
        "--data_dir",
        metavar="FOLDER",
        type=lasting,
        default=spec.default,
        help=f"{spec.help} (default {spec.default})",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option for where a trained model computes."""
    default = flat_fields()["device"].default
    parser.add_argument(
        "--device",
        choices=get_args(Device),
        default=default,
        help=f"where to compute; auto: on a GPU where there is one (default {default})",
    )


def _add_flag(group: argparse._ArgumentGroup, name: str, spec: FieldSpec, help_text: str) -> None:
    """A flag that stores its words as text; ``read_settings`` gives them their type."""
    metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else _METAVARS[spec.kind]
    shape: dict[str, Any] = {"nargs": 1}
    if spec.many:
        shape = {"nargs": "+"}
    elif spec.kind is bool:
        shape = {"nargs": "?", "const": "true"}
    group.add_argument(f"--{name}", dest=name, metavar=metavar, default=argparse.SUPPRESS, help=help_text, **shape)


def _help_text(spec: FieldSpec, alias: str | None) -> str:
    notes = [spec.unit] if spec.unit else []
    notes.append("required" if spec.default is Required else f"default {_shown(spec.default)}")
    if alias is not None:
        notes.append(f"also --{alias}")
    return f"{spec.help} ({'; '.join(notes)})".replace("%", "%%")


def _shown(value: object) -> str:
    """A default as it would be typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return " ".join(_shown(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings given on the command line and in the file of --config, by our names, each of the right type.

    Raises UserError for a wrong type, a setting given under two names, or an unreadable file.
    """
    settings = load_flat(args.config) if args.config is not None else {}
    words = {key: value for key, value in vars(args).items() if key in flat_fields() or key in ALIASES}
    try:
        for name, given in canonical_names(words).items():
            settings[name] = parse_words(flat_fields()[name], [given] if isinstance(given, str) else given)
    except ValueError as error:
        raise UserError(str(error)) from error
    return settings | _lasting_paths(settings)


def _lasting_paths(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings whose paths, given or default, do not begin in this folder."""
    paths = {name: settings.get(name, flat_fields()[name].default) for name in LASTING}
    return {name: lasting(path) for name, path in paths.items() if path is not None and lasting(path) != path}


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The TrainConfig of a command line: of a run that it resumes, what is not given is as it was.

    Raises UserError naming the setting, the value and what is allowed.
    """
    from cluster.run.resumed import saved_settings
    from cluster.worker.fine_tuning import with_architecture  # brings pyarrow, which is slow to import

    given = read_settings(args)
    try:
        return TrainConfig.from_flat({**saved_settings(given), **with_architecture(given)})
    except ValueError as error:
        raise UserError(str(error)) from error
