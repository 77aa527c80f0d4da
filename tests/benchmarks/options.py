"""The benchmarks' own options: read with argparse, since they have to run without the rest of the project."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends the process, status 2, with one line, and takes flags only in full."""

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(prog=f"crystalformer bench {name}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        self.exit(2, f"error: {message} ({self.prog} --help lists the options)\n")


def device(text: str) -> str:
    """cpu, or cuda where there is a GPU."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("cuda: PyTorch sees no GPU on this machine")
    return text


def out_file(text: str) -> Path:
    """A file to write, whose folder is there: known before what is to be written has taken minutes."""
    if not Path(text).parent.is_dir() or Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in a folder that there is, got {text!r}")
    return Path(text)


def positive(text: str) -> int:
    """A whole number above 0."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number, 0 allowed."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text!r}")
    return int(text)


def several(of_one: Callable[[str], int]) -> Callable[[str], list[int]]:
    """Numbers joined by commas, each read by ``of_one``."""

    def read(text: str) -> list[int]:
        return [of_one(part) for part in text.split(",")]

    return read


def some_of(*names: str) -> Callable[[str], list[str]]:
    """Names joined by commas, each one of ``names``; none at all where the text is empty."""

    def read(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",") if part.strip()]
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(names)}, got {unknown[0]!r}")
        return chosen

    return read
