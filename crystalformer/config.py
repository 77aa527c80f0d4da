"""ModelConfig: the architecture, in the paper's names, each default once."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

Backend = Literal["auto", "torch", "numba", "triton", "reference"]
"""Implementations of the attention (ops/attention.py)."""

Domain = Literal["real", "reci", "multihead", "real-reci", "reci-real"]
Pooling = Literal["avr", "max"]
NormType = Literal["no", "bn"]
PrePoolingOp = Literal["no", "relu", "w+relu", "w+bn+relu"]
PositiveName = Literal["elu", "abs", "exp", "softplus", "sigmoid"]

CUTOFF_SIGMAS = 6.0
"""An atom's sum ends at this many widths of its own widest Gaussian, unless told otherwise."""

LEAST_BETA = 1e-4
"""Of a positive function; the greatest is its reciprocal. Beyond, softplus divides by nearly 0 or is a step."""

_POSITIVE = (
    f"one of {', '.join(get_args(PositiveName))}, each alone or followed by =beta "
    f"with beta from {LEAST_BETA:g} to {1 / LEAST_BETA:g}"
)
"""What positive_func may be; made here, as torch.compile does not trace the text of a number."""

MOST_LAYERS = 1000
"""What follows from a config is found layer by layer: a file that says a billion of them is not gone through."""

MAX_ATOMIC_NUMBER = 98
"""Elements H to Cf have a row in the embedding table."""


SHOWN = 80
"""Characters of a wrong value that a message repeats at most."""


def about(text: str, unit: str = "") -> dict[str, str]:
    """Metadata of a setting's field: what it is, for --help, and its unit."""
    return {"help": text, "unit": unit}


def require(condition: bool, name: str, value: object, allowed: str) -> None:  # noqa: FBT001 - a predicate
    """ValueError that names the setting, its value and what is allowed, where the condition does not hold."""
    if not condition:
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")


def shown(value: object) -> str:
    """``value`` as a message writes it: as in Python, but no longer than SHOWN characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python writes, lists in lists in lists
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max  # math.isfinite raises for an int of 400 digits


class Neighborhood(NamedTuple):
    """What a model looks at around an atom.

    radius: Å, 0 where no layer attends in real space. distinct: of atoms that see the same crystal one does for all.
    """

    radius: float
    distinct: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class PositiveFunction:
    """Which rho bounds the Gaussians' precision (model.md, section 1), parsed from e.g. ``elu=0.1``."""

    name: PositiveName
    beta: float

    @classmethod
    def parse(cls, text: str) -> PositiveFunction:
        """Read ``name`` or ``name=beta``; beta is 1 where absent. ValueError names what is allowed."""
        name, _, beta_text = str(text).partition("=")
        require(name in get_args(PositiveName), "positive_func", text, _POSITIVE)
        try:
            beta = float(beta_text) if "=" in str(text) else 1.0
        except ValueError:
            beta = math.nan
        require(LEAST_BETA <= beta <= 1 / LEAST_BETA, "positive_func", text, _POSITIVE)
        return cls(name=name, beta=beta)  # type: ignore[arg-type]  # membership was checked above


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Architecture of a Crystalformer. Defaults are the paper's; wrong values raise ValueError."""

    num_layers: int = field(default=4, metadata=about("self-attention blocks"))
    model_dim: int = field(default=128, metadata=about("features of an atom"))
    head_num: int = field(default=8, metadata=about("attention heads; divides model_dim"))
    ff_dim: int = field(default=512, metadata=about("hidden features of a block's feed-forward network"))
    embedding_dim: Sequence[int] = field(default=(128,), metadata=about("hidden sizes of the head after pooling"))
    domain: Domain = field(default="real", metadata=about("where attention sums: real, reciprocal, or both"))
    scale_real: Sequence[float] | float = field(
        default=(1.4,),
        metadata=about("r_0: width of the real-space Gaussians; several: layer l takes number l mod count", "Å"),
    )
    scale_reci: Sequence[float] | float = field(
        default=(2.2,), metadata=about("width that damps reciprocal vectors; several: as scale_real", "Å")
    )
    gauss_lb_real: float = field(default=0.5, metadata=about("b: lower bound of rho in real space, 0 < b < 1"))
    gauss_lb_reci: float = field(default=0.5, metadata=about("b: lower bound of rho in reciprocal space, 0 < b < 1"))
    positive_func: str = field(
        default="elu=0.1", metadata=about("rho: elu, abs, exp, softplus or sigmoid, with =beta")
    )
    value_pe_dist_real: int = field(
        default=64, metadata=about("K: radial basis functions in the values; a multiple of 16, 0 for none")
    )
    value_pe_dist_max: float = field(
        default=-10.0, metadata=about("r_max of the radial basis; negative: that many times scale_real", "Å")
    )
    value_pe_width_scale: float = field(
        default=1.0, metadata=about("width of a radial basis function in units of r_max/K")
    )
    value_pe_headed: bool = field(default=True, metadata=about("a radial projection W a head, not one for all"))
    pooling: Pooling = field(default="avr", metadata=about("mean or maximum over the atoms of the cell"))
    norm_type: NormType = field(default="no", metadata=about("normalization in the head: none or batch norm"))
    pre_pooling_op: PrePoolingOp = field(default="no", metadata=about("operation on atoms before pooling"))
    num_targets: int = field(default=1, metadata=about("properties predicted at once"))
    cutoff_sigmas: float = field(
        default=CUTOFF_SIGMAS,
        metadata=about(
            "truncation tolerance: an atom sums images within this many widths of its own widest Gaussian "
            "(6 keeps the output within 1e-6 of the infinite sum)"
        ),
    )

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "scale_real", "scale_reci"):
            value = getattr(self, name)
            several = isinstance(value, Sequence) and not isinstance(value, str)
            object.__setattr__(self, name, tuple(value) if several else (value,))
        self._check_sizes()
        self._check_choices()
        self._check_ranges()

    def _check_sizes(self) -> None:
        for name in ("num_layers", "model_dim", "head_num", "ff_dim", "num_targets"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, name, value, "an integer of at least 1")
        require(self.num_layers <= MOST_LAYERS, "num_layers", self.num_layers, "at most 1000")
        require(
            len(self.embedding_dim) > 0 and all(type(n) is int and n >= 1 for n in self.embedding_dim),
            "embedding_dim",
            self.embedding_dim,
            "one or more integers of at least 1",
        )
        require(
            self.model_dim % self.head_num == 0,
            "head_num",
            self.head_num,
            f"a divisor of model_dim={self.model_dim}",
        )
        k = self.value_pe_dist_real
        require(type(k) is int and k >= 0 and k % 16 == 0, "value_pe_dist_real", k, "0 or a multiple of 16")

    def _check_choices(self) -> None:
        choices = {"domain": Domain, "pooling": Pooling, "norm_type": NormType, "pre_pooling_op": PrePoolingOp}
        for name, literal in choices.items():
            allowed = get_args(literal)
            require(getattr(self, name) in allowed, name, getattr(self, name), "one of " + ", ".join(allowed))
        require(isinstance(self.value_pe_headed, bool), "value_pe_headed", self.value_pe_headed, "true or false")
        require(
            self.domain != "multihead" or self.head_num % 2 == 0,
            "head_num",
            self.head_num,
            "even where domain is multihead",
        )
        PositiveFunction.parse(self.positive_func)

    def _check_ranges(self) -> None:
        for name in ("scale_real", "scale_reci"):
            value = getattr(self, name)
            good = len(value) > 0 and all(is_number(v) and v > 0 for v in value)
            require(good, name, value if len(value) != 1 else value[0], "greater than 0 (Å)")
        for name in ("gauss_lb_real", "gauss_lb_reci"):
            value = getattr(self, name)
            require(is_number(value) and 0 < value < 1, name, value, "between 0 and 1, both excluded")
        r_max = self.value_pe_dist_max
        require(is_number(r_max) and r_max != 0, "value_pe_dist_max", r_max, "a number other than 0")
        width = self.value_pe_width_scale
        require(is_number(width) and width > 0, "value_pe_width_scale", width, "greater than 0")
        cutoff = self.cutoff_sigmas
        require(is_number(cutoff) and 1 <= cutoff <= 12, "cutoff_sigmas", cutoff, "between 1 and 12")

    @property
    def head_dim(self) -> int:
        """D: features of a head."""
        return self.model_dim // self.head_num

    @property
    def positive(self) -> PositiveFunction:
        """The parsed ``positive_func``."""
        return PositiveFunction.parse(self.positive_func)

    def layer_scale_real(self, layer: int) -> float:
        """scale_real of layer ``layer`` (Å)."""
        scales = tuple(self.scale_real)  # type: ignore[arg-type]  # a tuple since __post_init__
        return float(scales[layer % len(scales)])

    def layer_scale_reci(self, layer: int) -> float:
        """scale_reci of layer ``layer`` (Å)."""
        scales = tuple(self.scale_reci)  # type: ignore[arg-type]  # a tuple since __post_init__
        return float(scales[layer % len(scales)])

    def layer_domain(self, layer: int) -> Literal["real", "reci", "multihead"]:
        """The domain in which layer ``layer`` attends; real-reci and reci-real alternate."""
        if self.domain in ("real-reci", "reci-real"):
            first, second = self.domain.split("-")
            return first if layer % 2 == 0 else second  # type: ignore[return-value]  # split of the two names
        return self.domain  # type: ignore[return-value]  # the two alternating names were handled

    def radial_max(self, layer: int) -> float:
        """r_max of the radial basis in layer ``layer`` (Å)."""
        if self.value_pe_dist_max > 0:
            return float(self.value_pe_dist_max)
        return -float(self.value_pe_dist_max) * self.layer_scale_real(layer)

    @property
    def neighbor_radius(self) -> float:
        """Radius (Å) that holds every image any layer may need: cutoff_sigmas of the widest possible Gaussian."""
        real = [layer for layer in range(self.num_layers) if self.layer_domain(layer) != "reci"]
        widest = max((self.layer_scale_real(layer) for layer in real), default=0.0)
        return self.cutoff_sigmas * widest / math.sqrt(self.gauss_lb_real)

    @property
    def neighborhood(self) -> Neighborhood:
        """``neighbor_radius``, and whether atoms that see the same crystal are computed once (equivalence.py).

        They are not where a layer attends in reciprocal space, where more than distances counts, nor where batch
        normalization averages over atoms, nor where the largest of nearly equal atoms is taken: of their deviations
        only the mean is nothing.
        """
        of_atoms = self.pre_pooling_op == "w+bn+relu" and self.norm_type == "bn"
        distinct = self.domain == "real" and self.pooling == "avr" and not of_atoms
        return Neighborhood(self.neighbor_radius, distinct)

    @property
    def wave_radius(self) -> float:
        """Radius (1/Å) that holds every wave vector any layer may need; 0 where none attends in reciprocal space."""
        reci = [layer for layer in range(self.num_layers) if self.layer_domain(layer) != "real"]
        narrowest = min((self.layer_scale_reci(layer) for layer in reci), default=math.inf)
        return self.cutoff_sigmas / (narrowest * math.sqrt(self.gauss_lb_reci))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and YAML; ``ModelConfig.from_dict`` reads them back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """The config of ``to_dict``'s values; an unknown key raises ValueError."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown model setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
        return cls(**values)
