"""What a worker loads of DeepSpeed and PyTorch, without the seconds that only what is unused here takes to load."""

from __future__ import annotations

import inspect
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

_LOAD_COMPILER = ("add_param_group", "zero_grad", "state_dict", "load_state_dict", "step")
"""Methods of PyTorch's optimizers that load its compiler when first called, to have it pass them by."""


def load_deepspeed() -> ModuleType:
    """DeepSpeed, without MLflow: its autotuner, which nothing here uses, takes 1.4 s of every worker to load it."""
    without = "mlflow" not in sys.modules
    if without:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # Python's own way to say: not to be imported
    try:
        import deepspeed
    finally:
        if without:
            del sys.modules["mlflow"]
    module: ModuleType = deepspeed
    return module


@cache
def uncompiled(kind: type[Optimizer]) -> Any:  # noqa: ANN401 - mypy knows no class made like this
    """The optimizer ``kind`` for steps that are never compiled: it does the same and leaves PyTorch's compiler out.

    To load that takes 1.5 s of every worker.
    """
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in _LOAD_COMPILER}
    methods["step"] = torch.no_grad()(methods["step"])
    return type(kind.__name__, (kind,), methods)
