"""The settings of a config dataclass, read from its annotations: what a value may be, and reading one from text."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal

from cluster.settings.workers import WorkerRange
from crystalformer.config import shown

_NOUNS = {int: "integer", float: "number", str: "text", bool: "true or false", WorkerRange: WorkerRange.NOUN}
_TRUTH = {"true": True, "false": False}


class Required:
    """The default of a setting that has none (the class itself stands for it)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldSpec:
    """One setting of a config: its name is the flag, the YAML key and the dataclass field."""

    name: str
    kind: type
    """int, float, bool, str or WorkerRange: of the value, or of each of the values."""
    many: bool
    """A tuple of values; a scalar is taken for a tuple of one."""
    optional: bool
    """None is allowed."""
    choices: tuple[str, ...]
    """The only texts allowed; empty where any is."""
    default: Any
    """``Required`` where the user must give one."""
    help: str
    unit: str

    @property
    def allowed(self) -> str:
        """What a value may be, for messages."""
        if self.choices:
            text = "one of " + ", ".join(self.choices)
        elif self.many:
            text = f"one or more {_NOUNS[self.kind]}s" if self.kind is not str else "one or more names"
        else:
            noun = _NOUNS[self.kind]
            article = {"integer": "an ", "number": "a "}.get(noun, "")
            text = article + noun
        return f"{text}, or none" if self.optional else text

    def wrong(self, value: object) -> ValueError:
        """The error for ``value``."""
        return ValueError(f"{self.name} must be {self.allowed}, got {shown(value)}")


def coerce(spec: FieldSpec, value: object) -> Any:  # noqa: ANN401 - the type is the spec's
    """``value`` in the type of the setting: integers for floats, text such as 1e-4 for floats, a scalar for a tuple.

    Raises ValueError naming the setting, the value and what is allowed; never converts anything else.
    """
    if value is None and spec.optional:
        return None
    if not spec.many:
        return _coerce_one(spec, value, value)
    if isinstance(value, str):
        items: Sequence[object] = [part for part in value.split(",") if part.strip()]
    elif isinstance(value, list | tuple):
        items = value
    else:
        items = (value,)
    return tuple(_coerce_one(spec, item, value) for item in items)


def _coerce_one(spec: FieldSpec, item: object, whole: object) -> bool | int | float | str | WorkerRange:
    if spec.kind is WorkerRange:
        try:
            return WorkerRange.of(item)
        except ValueError as error:
            raise ValueError(f"{spec.name} {error}") from error
    if isinstance(item, bool):
        if spec.kind is bool:
            return item
    elif spec.kind is int and isinstance(item, Integral):
        return int(item)
    elif spec.kind is float:
        number = _to_float(item)
        if math.isfinite(number):
            return number
    elif spec.kind is str and isinstance(item, str):
        text = item.strip()
        if not spec.choices or text in spec.choices:
            return text
    raise spec.wrong(whole)


def _to_float(item: object) -> float:
    """``item`` as a float; NaN where it is none."""
    try:
        return float(item) if isinstance(item, Real | str) else math.nan
    except (ValueError, OverflowError):  # an int may have more digits than a float holds
        return math.nan


def parse_words(spec: FieldSpec, words: Sequence[str]) -> Any:  # noqa: ANN401 - the type is the spec's
    """The value spelt by the words after a flag: numbers, true, false, ``none`` where optional, lists with commas.

    Raises ValueError as ``coerce`` does.
    """
    if spec.optional and [word.strip().lower() for word in words] == ["none"]:
        return None
    shown = " ".join(word.strip() for word in words)
    if not spec.many:
        return _coerce_one(spec, _parse_word(spec.kind, words[-1]), shown)
    parts = [part for word in words for part in word.split(",") if part.strip()]
    return tuple(_coerce_one(spec, _parse_word(spec.kind, part), shown) for part in parts)


def _parse_word(kind: type, word: str) -> object:
    """The word as a bool or an int where it is one; the word itself elsewhere, for ``_coerce_one`` to judge."""
    if kind is bool:
        return _TRUTH.get(word.strip().lower(), word)
    if kind is int:
        try:
            return int(word)
        except ValueError:
            return word
    return word


@cache
def specs_of(config_type: type) -> tuple[FieldSpec, ...]:
    """The settings of a config dataclass in their order; each field's metadata holds ``help`` and ``unit``."""
    hints = typing.get_type_hints(config_type)
    return tuple(
        FieldSpec(
            name=f.name,
            default=_default_of(f),
            help=f.metadata["help"],
            unit=f.metadata["unit"],
            **_read_annotation(hints[f.name]),
        )
        for f in fields(config_type)
    )


def _default_of(field: Any) -> Any:  # noqa: ANN401 - dataclasses.Field of any type
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else Required


def _read_annotation(annotation: Any) -> dict[str, Any]:  # noqa: ANN401 - annotations have no common type
    """kind, many, optional and choices of an annotation such as ``float | None`` or ``tuple[str, ...]``."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    parts = typing.get_args(annotation) if union else (annotation,)
    present = [part for part in parts if part is not type(None)]
    optional = len(present) < len(parts)
    lists = [part for part in present if typing.get_origin(part) in (tuple, Sequence)]
    inner = typing.get_args(lists[0])[0] if lists else present[0]
    choices = typing.get_args(inner) if typing.get_origin(inner) is Literal else ()
    kind = str if choices else inner
    if kind not in _NOUNS:
        raise TypeError(f"a setting cannot have the annotation {annotation!r}")
    return {"kind": kind, "many": bool(lists), "optional": optional, "choices": choices}
