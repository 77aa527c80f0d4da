"""Files: writing so that a reader never sees half of one, and reading strict YAML."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import UserError


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` in one step: a crash leaves the old file or the new one, never a part.

    Missing parent folders are made. Raises OSError where the folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def settle(folder: Path) -> None:
    """Have the content of all files of a folder on the disk: after a power cut none is there by its name alone."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a YAML file; an empty file is an empty one.

    Only ``true`` and ``false`` are booleans (``no`` stays the text it is among our choices) and dates stay text.
    Raises UserError, naming file and line, for anything unreadable, a repeated key, an alias, or a file that is no
    mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8") from error
    try:
        content = yaml.load(text, Loader=_StrictLoader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_message(error)}") from error
    except (ValueError, RecursionError) as error:  # a number or date that is none, brackets in brackets
        raise UserError(f"{path}: {' '.join(str(error).split()):.200}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold lines of `name: value`, got {type(content).__name__}")
    return content


def dump_yaml(values: dict[str, Any]) -> str:
    """``values`` as YAML, a line each, in their order; ``read_yaml`` gives them back.

    A list that two of them share is written twice.
    """
    return yaml.dump(values, Dumper=_LineDumper, sort_keys=False, default_flow_style=False, width=1000)


def _yaml_message(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    return f"line {error.problem_mark.line + 1}: {error.problem or error.context}"


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses repeated keys and aliases, and guesses fewer types from plain words.

    A few lines of aliases to lists of aliases stand for more than fits in memory.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = f"*{event.anchor} is an alias, which settings cannot have; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


def _construct_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"{key!r} is not the name of a setting", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_GUESSED_AWAY = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp")
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _GUESSED_AWAY]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("true|True|TRUE|false|False|FALSE"), list("tTfF")
)


class _LineDumper(yaml.SafeDumper):
    """SafeDumper that writes a list on one line, and no aliases: we would not read them."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_LineDumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)
