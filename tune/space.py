"""The search space: which settings of a training run to vary, and how; read from YAML and checked before the start.

    scale_real: {log: [0.5, 3.5]}
    gauss_lb_real: {uniform: [0.1, 0.9]}
    value_pe_dist_real: {integer: [0, 256], step: 16}
    optimizer: {choice: [adamw, adam]}
    weight_decay: {log: [1e-6, 1e-2], when: {optimizer: adamw}}

A setting under ``when`` is varied only where an earlier one has the value, or one of the values; elsewhere it is what
the command line or its default says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import BaseTrial

from cluster.errors import UserError
from cluster.files import read_yaml
from cluster.settings.config import ALIASES, TrainConfig, flat_fields, section_fields, suggestion
from cluster.settings.fields import FieldSpec, coerce

DEFAULT: dict[str, dict[str, Any]] = {
    "scale_real": {"log": [0.5, 3.5]},
    "gauss_lb_real": {"uniform": [0.1, 0.9]},
    "value_pe_dist_real": {"integer": [0, 256], "step": 16},
}
"""What is searched where no file says otherwise: the paper's own three parameters."""

KINDS = ("uniform", "log", "integer", "choice")

_NOT_VARIED = {
    "epochs": "early stopping decides it",
    "swa_epochs": "averaged weights are not validated",
    "gradient_accumulation": "it does not change what is computed",
}
_RECIPE = [spec.name for section in ("model", "optim") for spec in section_fields(section)]
SEARCHABLE = (
    *(name for name in _RECIPE if name not in _NOT_VARIED),
    "batch_size",
    "precision",
)
"""Settings that change what a run computes, and so may be searched."""

Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One varied setting."""

    name: str
    distribution: BaseDistribution
    condition: tuple[str, tuple[Any, ...]] | None
    """An earlier parameter and the values of it for which this one is varied."""
    rule: Mapping[str, Any]
    """As it was written."""

    def encode(self, value: Any) -> Any:  # noqa: ANN401 - any setting's type
        """A setting's value as Optuna keeps it: a list of one as its item, longer lists as their JSON text."""
        if isinstance(value, list | tuple):
            value = list(value)
            return value[0] if len(value) == 1 else json.dumps(value)
        return value

    def decode(self, value: Any) -> Any:  # noqa: ANN401
        """What ``encode`` was given."""
        return json.loads(value) if isinstance(value, str) and value.startswith("[") else value

    def extremes(self) -> list[Any]:
        """The values to try for a check: both ends and the first step, or every choice; decoded."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return [self.decode(choice) for choice in d.choices]
        if isinstance(d, IntDistribution):
            return list(dict.fromkeys([d.low, d.high, d.low + d.step]))
        if isinstance(d, FloatDistribution):
            return [d.low, d.high]
        raise TypeError(f"{self.name} has an unknown distribution {d!r}")

    def values(self) -> Sequence[Any] | None:
        """Every encoded value; None where it is any number of a range."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return d.choices
        return range(d.low, d.high + 1, d.step) if isinstance(d, IntDistribution) else None

    def contains(self, value: Any) -> bool:  # noqa: ANN401
        """Whether the encoded value could be suggested."""
        d = self.distribution
        if isinstance(d, CategoricalDistribution):
            return value in d.choices
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        inside = isinstance(d, FloatDistribution | IntDistribution) and d.low <= value <= d.high
        return inside and (not isinstance(d, IntDistribution) or d.log or (value - d.low) % d.step == 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """All varied settings, in the order they are suggested."""

    parameters: tuple[Parameter, ...]

    def suggest(self, trial: BaseTrial) -> Settings:
        """Have Optuna choose a value of every parameter whose condition holds; encoded values, by name."""
        chosen: Settings = {}
        for parameter in self.parameters:
            if self._active(parameter, chosen):
                chosen[parameter.name] = _suggested(trial, parameter)
        return chosen

    def settings(self, chosen: Mapping[str, Any]) -> Settings:
        """Encoded values as settings of a TrainConfig."""
        return {p.name: p.decode(chosen[p.name]) for p in self.parameters if p.name in chosen}

    def given(self, flat: Mapping[str, Any]) -> Settings | None:
        """The encoded values of flat settings; None where one of them lies outside the space."""
        chosen: Settings = {}
        for parameter in self.parameters:
            if self._active(parameter, chosen):
                chosen[parameter.name] = parameter.encode(flat[parameter.name])
                if not parameter.contains(chosen[parameter.name]):
                    return None
        return chosen

    def combinations(self) -> Iterator[Settings] | None:
        """All that can be suggested, encoded, one after another; None where there is no end of it."""
        values = {parameter.name: parameter.values() for parameter in self.parameters}
        finite = {name: found for name, found in values.items() if found is not None}
        return self._combined({}, self.parameters, finite) if len(finite) == len(values) else None

    def _combined(
        self, chosen: Settings, left: Sequence[Parameter], values: Mapping[str, Sequence[Any]]
    ) -> Iterator[Settings]:
        if not left:
            yield chosen
            return
        first, *others = left
        if not self._active(first, chosen):
            yield from self._combined(chosen, others, values)
            return
        for value in values[first.name]:
            yield from self._combined({**chosen, first.name: value}, others, values)

    def rules(self) -> dict[str, dict[str, Any]]:
        """The space as YAML would hold it."""
        return {parameter.name: dict(parameter.rule) for parameter in self.parameters}

    @staticmethod
    def _active(parameter: Parameter, chosen: Mapping[str, Any]) -> bool:
        if parameter.condition is None:
            return True
        name, values = parameter.condition
        return name in chosen and chosen[name] in values


def _suggested(trial: BaseTrial, parameter: Parameter) -> Any:  # noqa: ANN401 - of the parameter's type
    name, d = parameter.name, parameter.distribution
    if isinstance(d, CategoricalDistribution):
        return trial.suggest_categorical(name, d.choices)
    if isinstance(d, IntDistribution):
        return trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
    if isinstance(d, FloatDistribution):
        return trial.suggest_float(name, d.low, d.high, log=d.log)
    raise TypeError(f"{name} has an unknown distribution {d!r}")


# Reading ----------------------------------------------------------------------------------------------------------


def load_space(path: str | None, base: TrainConfig) -> Space:
    """The space of a YAML file, or the default one. UserError, one line, names what is wrong with which setting."""
    content = DEFAULT if path is None else read_yaml(path)
    try:
        space = read_space(content)
        check_values(space, base)
    except ValueError as error:
        raise UserError(f"{path or 'search space'}: {error}") from error
    return space


def read_space(content: Mapping[str, Any]) -> Space:
    """The space that rules by setting describe. ValueError for an unknown setting, kind, type or range."""
    if not content:
        raise ValueError("names no setting to search")
    parameters: dict[str, Parameter] = {}
    for key, rule in content.items():
        name = ALIASES.get(key, key)
        spec = _spec(name)
        if name in parameters:
            raise ValueError(f"{name} is given twice")
        if not isinstance(rule, Mapping):
            raise ValueError(f"{name} must be a rule such as {{uniform: [LOW, HIGH]}}, got {rule!r}")
        parameters[name] = _parameter(spec, rule, parameters)
    return Space(parameters=tuple(parameters.values()))


def _spec(name: str) -> FieldSpec:
    if name in _NOT_VARIED:
        raise ValueError(f"{name} cannot be searched: {_NOT_VARIED[name]}")
    if name not in flat_fields():
        raise ValueError(f"unknown setting {name!r}{suggestion(name, list(SEARCHABLE))}")
    if name not in SEARCHABLE:
        raise ValueError(f"{name} cannot be searched: it says where or on what a run works, not what it computes")
    return flat_fields()[name]


def _parameter(spec: FieldSpec, rule: Mapping[str, Any], earlier: Mapping[str, Parameter]) -> Parameter:
    kinds = [key for key in rule if key in KINDS]
    others = [key for key in rule if key not in (*KINDS, "step", "when")]
    if others:
        known = [*KINDS, "step", "when"]
        raise ValueError(f"{spec.name}: unknown word {others[0]!r}{suggestion(others[0], known)}")
    if len(kinds) != 1:
        raise ValueError(f"{spec.name} must have one of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}")
    kind = kinds[0]
    if "step" in rule and kind != "integer":
        raise ValueError(f"{spec.name}: step goes with integer, not with {kind}")
    distribution = _choices(spec, rule[kind]) if kind == "choice" else _range(spec, kind, rule)
    return Parameter(
        name=spec.name,
        distribution=distribution,
        condition=_condition(spec.name, rule["when"], earlier) if "when" in rule else None,
        rule=rule,
    )


def _choices(spec: FieldSpec, values: object) -> CategoricalDistribution:
    if not isinstance(values, list) or len(values) < 1:
        raise ValueError(f"{spec.name}: choice must be a list of values, got {values!r}")
    choices = []
    for value in values:
        good = coerce(spec, value)
        if isinstance(good, tuple):
            good = good[0] if len(good) == 1 else json.dumps(list(good))
        choices.append(good)
    if len(set(choices)) < len(choices):
        raise ValueError(f"{spec.name}: choice gives a value twice: {values!r}")
    return CategoricalDistribution(choices)


def _range(spec: FieldSpec, kind: str, rule: Mapping[str, Any]) -> BaseDistribution:
    if spec.kind not in (int, float):
        raise ValueError(f"{spec.name} has no numbers to range over; use choice")
    if kind == "uniform" and spec.kind is int:
        raise ValueError(f"{spec.name} takes integers; use integer instead of uniform")
    if kind == "integer" and spec.kind is float:
        raise ValueError(f"{spec.name} takes any number; use uniform or log instead of integer")
    bounds = rule[kind]
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ValueError(f"{spec.name}: {kind} must be [LOW, HIGH], got {bounds!r}")
    low, high = (_number(spec, kind, bound) for bound in bounds)
    if not low < high:
        raise ValueError(f"{spec.name}: {kind} must have LOW below HIGH, got {bounds!r}")
    if kind == "log" and low <= 0:
        raise ValueError(f"{spec.name}: log must have LOW above 0, got {bounds!r}")
    if spec.kind is float:
        return FloatDistribution(low, high, log=kind == "log")
    step = _number(spec, "step", rule.get("step", 1))
    if step < 1 or (high - low) % step != 0:
        raise ValueError(f"{spec.name}: step must lead from {low:g} to {high:g}, got {step:g}")
    return IntDistribution(int(low), int(high), step=int(step), log=kind == "log")


def _number(spec: FieldSpec, what: str, value: object) -> float:
    """A bound or step of the setting's type, of which there must be one number."""
    try:
        good = coerce(spec, value)
    except ValueError as error:
        raise ValueError(f"{spec.name}: {what}: {error}") from error
    if isinstance(good, tuple):
        if len(good) != 1:
            raise ValueError(f"{spec.name}: {what} takes numbers, got {value!r}")
        good = good[0]
    if good is None:
        raise ValueError(f"{spec.name}: {what} takes numbers, got none")
    return good  # type: ignore[no-any-return]  # an int or a float, as the spec says


def _condition(name: str, when: object, earlier: Mapping[str, Parameter]) -> tuple[str, tuple[Any, ...]]:
    if not isinstance(when, Mapping) or len(when) != 1:
        raise ValueError(f"{name}: when must name one earlier setting and its value, got {when!r}")
    other, wanted = next(iter(when.items()))
    if other not in earlier:
        raise ValueError(f"{name}: when names {other!r}, which is not searched before {name}")
    spec, parameter = flat_fields()[other], earlier[other]
    values = []
    for value in wanted if isinstance(wanted, list) else [wanted]:
        encoded = parameter.encode(coerce(spec, value))
        if not parameter.contains(encoded):
            raise ValueError(f"{name}: when: {other} is never {value!r}")
        values.append(encoded)
    return other, tuple(values)


# Checking ---------------------------------------------------------------------------------------------------------


def check_values(space: Space, base: TrainConfig) -> None:
    """ValueError where an end or a choice of a parameter is not allowed with the base settings.

    What only goes together with other searched values, such as head_num with model_dim, is tried with the ends and
    choices of one other parameter; combinations that are wrong all the same are recorded as failed trials.
    """
    flat = base.to_flat()
    for parameter in space.parameters:
        for value in parameter.extremes():
            first: ValueError | None = None
            for settings in _company(space, parameter, value):
                try:
                    TrainConfig.from_flat(flat | settings)
                    break
                except ValueError as error:
                    first = first or error
            else:
                raise ValueError(f"{parameter.name}: {first}")


def _company(space: Space, parameter: Parameter, value: Any) -> Iterator[Settings]:  # noqa: ANN401
    """``value`` alone, with its condition met, and with each end of each other parameter."""
    alone = {parameter.name: value}
    if parameter.condition is not None:
        other, values = parameter.condition
        decoder = next(p for p in space.parameters if p.name == other)
        alone[other] = decoder.decode(values[0])
    yield alone
    for other_parameter in space.parameters:
        if other_parameter.name not in alone:
            for other_value in other_parameter.extremes():
                yield alone | {other_parameter.name: other_value}
