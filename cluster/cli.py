"""The ``crystalformer`` command: finds the command, turns the user's mistakes into one line and exit status 2."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, Protocol, cast

from cluster.commands import MODULES
from cluster.commands.parser import Parser, normalize
from cluster.errors import Incomplete, RunFailed, UserError
from cluster.interrupts import RunStopped
from cluster.log import escape_what_stdout_lacks, setup_logging
from data_pipeline.errors import DataError
from data_pipeline.text import printable

DESCRIPTION = "Train Crystalformer and predict with it: properties of crystals from their structures."
_DEBUG: dict[str, Any] = {
    "action": "store_true",
    "default": argparse.SUPPRESS,
    "help": "show a traceback for every error",
}
EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class Command(Protocol):
    """What a module of ``cluster.commands`` offers."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's options."""

    def run(self, args: argparse.Namespace) -> None:
        """Do it; raises UserError or DataError for what the user got wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (the process's own where None) and give its exit status: 0, 1, 2 or 130."""
    words = normalize(sys.argv[1:] if argv is None else argv)
    escape_what_stdout_lacks()
    setup_logging(level=logging.INFO if "--debug" in words else logging.WARNING)
    try:
        status = _run(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output (`| head`) has left; nothing more can be said to it, also not at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    return status


def _run(words: Sequence[str]) -> int:
    try:
        args = _parse(words)
        args.command.run(args)
    except (UserError, DataError) as error:
        if "--debug" in words:
            raise
        return _fail(f"error: {' '.join(str(error).split())}", EXIT_USER_ERROR)
    except RunFailed as failure:
        if "--debug" in words:
            raise
        return _fail(f"error: {' '.join(str(failure).split())}", failure.exit_status)
    except OSError as error:
        # Such as a folder that may not be entered; one without a file's name is no matter of the user's paths.
        if "--debug" in words or error.filename is None:
            raise
        return _fail(f"error: {error.filename}: {error.strerror}", EXIT_USER_ERROR)
    except (RunStopped, Incomplete) as stop:
        return _fail(str(stop), stop.exit_status)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)
    except SystemExit as stop:  # argparse's way to end after --help
        return EXIT_OK if stop.code is None else int(stop.code)
    return EXIT_OK


def _fail(line: str, status: int) -> int:
    sys.stderr.write(printable(line) + "\n")
    return status


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The namespace of the command that the words name; its module is ``command``."""
    parser = Parser(prog="crystalformer", description=DESCRIPTION)
    parser.add_argument("--debug", **_DEBUG)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command_name")
    chosen = next((word for word in words if not word.startswith("-")), None)
    commands: dict[str, Command] = {}
    for name, module in MODULES.items():
        commands[name] = cast(Command, importlib.import_module(module))
        command_parser = subparsers.add_parser(
            name, help=commands[name].HELP, description=commands[name].HELP.capitalize() + "."
        )
        if name == chosen:
            commands[name].add_arguments(command_parser)
        command_parser.add_argument("--debug", **_DEBUG)
    args, unknown = parser.parse_known_args(list(words))
    chosen_parser: Parser = parser if chosen is None else subparsers.choices[chosen]
    if unknown:
        chosen_parser.refuse(unknown)
    if chosen is None:
        parser.parse_args(["--help"])
    args.command = commands[args.command_name]
    return args
