"""How many workers a run has: a number, or a range within which Ray Train follows the cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from crystalformer.config import shown

_RANGE = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class WorkerRange:
    """From ``fewest`` to ``most`` workers; both the same for a fixed number. ValueError for anything else."""

    fewest: int
    most: int

    NOUN = "a number of workers or a range of them such as 1-4"

    def __post_init__(self) -> None:
        if not 1 <= self.fewest <= self.most:
            raise ValueError(f"must be at least 1, a range from the fewest to the most, got {str(self)!r}")

    @classmethod
    def of(cls, value: object) -> Self:
        """The range that ``4``, ``"4"`` or ``"1-4"`` stands for. ValueError where it stands for none."""
        found = _RANGE.fullmatch(str(value).strip()) if isinstance(value, int | str) else None
        if isinstance(value, cls):
            return value
        if found is None or isinstance(value, bool):
            raise ValueError(f"must be {cls.NOUN}, got {shown(value)}")
        return cls(int(found[1]), int(found[2] or found[1]))

    @property
    def elastic(self) -> bool:
        """Whether the number may change while the run goes on."""
        return self.fewest < self.most

    @property
    def plain(self) -> int | str:
        """What stands for it in YAML and JSON."""
        return str(self) if self.elastic else self.most

    def __str__(self) -> str:
        return f"{self.fewest}-{self.most}" if self.fewest != self.most else str(self.most)
