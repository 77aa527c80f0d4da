"""The precision that the operators compute in, whatever the program around them allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_FULL = ("none", "ieee")
"""Settings under which float32 products are float32 products; "none" is torch's default."""


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Products in the operands' dtype: no autocast, and no TF32 or bfloat16 products where the program allows them.

    Scores, exponents and structure factors are differences of large numbers that go through exp and log: 10 bits
    would leave weights that are wrong by percents.
    """
    backends: Any = torch.backends
    settings = backends.cuda.matmul if device.type == "cuda" else backends.mkldnn.matmul
    before = settings.fp32_precision
    with torch.autocast(device.type, enabled=False):
        if before in _FULL:
            yield
            return
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = before
