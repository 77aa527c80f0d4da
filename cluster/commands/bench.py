"""``crystalformer bench``: the measurements of tests/benchmarks, which come with a checkout."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from cluster.errors import UserError

HELP = "measure speed and memory with the benchmarks of a checkout"

CHECKOUT = Path(__file__).resolve().parents[2]
_PREFIX = "bench_"


def benchmarks(checkout: Path = CHECKOUT) -> dict[str, str]:
    """The benchmarks there are, by name: tests/benchmarks/bench_<name>.py, each with ``main(arguments)``."""
    files = sorted((checkout / "tests" / "benchmarks").glob(f"{_PREFIX}*.py"))
    return {file.stem.removeprefix(_PREFIX): f"tests.benchmarks.{file.stem}" for file in files}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which benchmark; the words after it are its own."""
    names = ", ".join(benchmarks()) or "none: this is no checkout"
    parser.usage = "%(prog)s NAME [options of the benchmark]"
    parser.add_argument("name", nargs="?", metavar="NAME", help=f"one of {names}; NAME --help shows its options")
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Run it. UserError where there is no checkout, or no such benchmark in it."""
    known = benchmarks()
    if not known:
        raise UserError(f"the benchmarks are in a checkout's tests/benchmarks, and {CHECKOUT} has none")
    if args.name not in known:
        what = "no benchmark given" if args.name is None else f"unknown benchmark {args.name!r}"
        raise UserError(f"{what}; there are {', '.join(known)}")
    if str(CHECKOUT) not in sys.path:
        sys.path.insert(0, str(CHECKOUT))
    module = importlib.import_module(known[args.name])
    module.main([word.strip() for word in args.words if word != "--debug"])
