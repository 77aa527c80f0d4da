"""Plans inside graphs: a compiled graph holds tensors alone, so an operator is handed a plan's number as a tensor.

A plan says how a batch is walked and keeps tables that grow on demand, which no fixed list of tensors could. Its
number leads back to it.
"""

from __future__ import annotations

import itertools
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from crystalformer.batch import lasting

Plan = TypeVar("Plan")


class Handles(Generic[Plan]):
    """Numbers for plans. A number's tensor keeps its plan: a batch, or a graph that saved the tensor, is enough."""

    def __init__(self) -> None:
        self._plans: WeakValueDictionary[int, Plan] = WeakValueDictionary()
        self._numbers = itertools.count()

    @lasting
    def give(self, plan: Plan) -> Tensor:
        """A new number for ``plan``: int64, no dimensions, on the CPU."""
        number = next(self._numbers)
        self._plans[number] = plan
        handle = torch.tensor(number, dtype=torch.int64, device="cpu")
        handle.plan = plan  # type: ignore[attr-defined]  # torch keeps attributes as long as any graph has the tensor
        return handle

    def plan(self, handle: Tensor) -> Plan:
        """The plan of a number; RuntimeError for any other."""
        plan = self._plans.get(int(handle))
        if plan is None:
            raise RuntimeError(f"there is no plan {int(handle)}: was its batch made in another process?")
        return plan
