"""``crystalformer convert``."""

from __future__ import annotations

import argparse
from pathlib import Path

from cluster.errors import UserError
from cluster.log import say
from cluster.paths import lasting, there

HELP = "turn the authors' checkpoint into model folders, or back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """From where, to where, which way, and what the file does not tell."""
    from cluster.commands.options import add_config_options

    parser.add_argument(
        "source", metavar="CHECKPOINT", type=there, help="the authors' torch file; with --to_reference a folder"
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        type=lasting,
        help="folder that gets model/ and model-swa/, or the file to write; none of them may be there yet",
    )
    parser.add_argument(
        "--to_reference", action="store_true", help="write the authors' torch file of a model or run folder"
    )
    parser.add_argument(
        "--target",
        dest="named",
        metavar="NAME:UNIT,..",
        help="what the weights predict, e.g. e_form:eV/atom (their file does not tell the unit)",
    )
    add_config_options(parser, sections=["model"])
    parser.usage = "%(prog)s CHECKPOINT OUT [options]"


def run(args: argparse.Namespace) -> None:
    """Convert and say what was written. UserError for a file or folder that does not fit."""
    from cluster.commands.options import read_settings
    from cluster.settings.config import section_fields

    names = {spec.name for spec in section_fields("model")}
    given = {name: value for name, value in read_settings(args).items() if name in names}
    from cluster.prediction.convert import to_file, to_folders

    if args.to_reference:
        if given or args.named is not None:
            raise UserError("--to_reference takes the architecture and targets from the model folder; give no others")
        to_file(args.source, Path(args.out))
        say(f"written   {args.out}")
        return
    converted = to_folders(Path(args.source), Path(args.out), given, named_targets(args.named))
    for line in converted.remarks:
        say(line)
    for folder in converted.folders:
        say(f"written   {folder}")


def named_targets(text: str | None) -> list[tuple[str, str]]:
    """Names and units of ``name:unit,...``; no unit where there is no colon."""
    if text is None:
        return []
    pairs = [part.strip().partition(":") for part in text.split(",")]
    if not all(name for name, _, _ in pairs):
        raise UserError(f"--target must be NAME or NAME:UNIT joined by commas, got {text!r}")
    return [(name, unit) for name, _, unit in pairs]
