"""The commands of ``crystalformer``, one module each.

A command's module has ``HELP`` (a line for the list), ``add_arguments(parser)`` and ``run(args)``, and imports at its
top only what is quick: torch, Ray, DeepSpeed and pymatgen belong inside ``run``. To add a command, write the module
and name it here. Modules are named by text, so that the command line can offer a command of a package above this one.
"""

from __future__ import annotations

MODULES = {
    "prepare": "cluster.commands.prepare",
    "train": "cluster.commands.train",
    "tune": "tune.command",
    "predict": "cluster.commands.predict",
    "evaluate": "cluster.commands.evaluate",
    "convert": "cluster.commands.convert",
    "info": "cluster.commands.info",
    "bench": "cluster.commands.bench",
}
"""Where each command lives, in the order of ``crystalformer --help``."""
