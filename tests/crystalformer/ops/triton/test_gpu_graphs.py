"""Compiled models and training steps captured as CUDA graphs: ``pytest -m gpu``.

All but what is marked for a GPU alone also runs on the CPU, through Triton's interpreter (test_interpreter.py).
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from crystalformer import CrystalBatch, Crystalformer  # after the check for triton
from tests.crystalformer.ops.triton import device
from tests.crystalformer.ops.triton.device import DEVICE, auto_is_triton  # noqa: F401 - a fixture

pytestmark = device.MARKS

COMPILER = "aot_eager" if device.INTERPRETED else "inductor"

BATCHES = ((3, 1, 5, 1, 1), (2, 4, 1, 3, 1, 2), (1, 2, 3))
"""Atoms of each crystal. The first batch's sizes equal no other dimension: torch would take the two for one."""


@pytest.mark.parametrize("domain", [pytest.param("real", marks=pytest.mark.gpu), "multihead"])
def test_a_model_is_compiled_whole_and_once_for_batches_of_any_size(domain: str) -> None:
    torch._dynamo.reset()
    model = device.model_of(domain, "auto", DEVICE)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=COMPILER)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for place, sizes in enumerate(BATCHES[:2] if device.INTERPRETED else BATCHES):
            batch = model.prepare(device.make_batch(sizes, seed=place).to(DEVICE))
            expected, found = device.outcome(model, batch), device.outcome(model, batch, compiled)
            assert all(
                far < 1e-5 for far in device.distances(found, expected)
            )  # measured on the CPU: 1e-7 with inductor


def step(model: Crystalformer, batch: CrystalBatch, target: Tensor) -> dict[str, Tensor]:
    """The loss and what a training step leaves as gradients."""
    model.zero_grad(set_to_none=True)
    loss: Tensor = (model(batch) - target).abs().mean()
    torch.autograd.backward(loss)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **gradients}


@pytest.mark.gpu
def test_a_captured_training_step_is_the_eager_one_bit_for_bit() -> None:
    model = device.model_of("real", "auto", DEVICE).train()
    batch = device.make_batch((4, 20, 7, 1, 2, 6)).to(DEVICE)
    target = torch.randn(batch.num_crystals, 1, device=DEVICE)
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(model, batch, target)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        found = step(model, batch, target)
    with torch.no_grad():  # what the graph then gives cannot be left over from its capture
        for parameter in model.parameters():
            parameter.mul_(1.01)
    expected = step(model, batch, target)
    graph.replay()
    torch.cuda.synchronize()
    assert set(found) == set(expected) == {"loss", *dict(model.named_parameters())}
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
