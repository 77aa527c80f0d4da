"""The argument parser of every command: dashes or underscores, no abbreviations, one-line errors."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from cluster.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of ending the process, and takes flags only in full."""

    def __init__(self, *, prog: str | None = None, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message."""
        raise UserError(f"{message} ({self.prog} --help lists the options)")

    def flags(self) -> list[str]:
        """Every option of this parser, with its leading dashes."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Raise UserError for words that no option or argument took, with the closest option where one is close."""
        word = unknown[0].strip()
        if not word.startswith("-"):
            raise UserError(f"unexpected argument {word!r} ({self.prog} --help lists the options)")
        flag = word.split("=")[0]
        close = difflib.get_close_matches(flag, self.flags(), n=1)
        hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the options"
        raise UserError(f"unknown option {flag}; {hint}")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def normalize(words: Sequence[str]) -> list[str]:
    """The words with flags in underscores, and with negative numbers kept from being read as flags.

    ``--model-dim=128`` becomes ``--model_dim=128``; ``-1e-3`` gets a leading blank, which marks it as a value. Words
    after a lone ``--`` stay as they are.
    """
    result: list[str] = []
    for position, word in enumerate(words):
        if word == "--":
            return [*result, *words[position:]]
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            word = f"--{flag.replace('-', '_')}{equals}{value}"
        elif word.startswith("-") and _is_number(word):
            word = f" {word}"
        result.append(word)
    return result


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
