"""G1: training steps of the default model, as training runs them and without its switch for determinism."""

from __future__ import annotations

import copy
import gc
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.utils.deterministic
from torch import Tensor

from crystalformer.batch import CrystalBatch
from crystalformer.config import ModelConfig
from crystalformer.model import Crystalformer
from crystalformer.ops.triton.rows import rows_of
from tests.benchmarks.gpu_process import Row, Task
from tests.benchmarks.gpu_timing import GRAPH_WARM_UP, graphed, median_ms, wait

NO_GRADIENT = "k_proj.bias"
"""Parameters without influence: a softmax does not feel what is added to all its scores. Their gradients are rounding
errors, and Adam makes full steps of them, so they tell nothing of whether two steps are the same."""

STEP_LIMIT = 1e-2
"""Of the way that parameters went, by which two runs of a few steps may differ. Sums that the GPU adds in any order
(only where determinism is off) stay far below; a step that is left out or reads old numbers lies far above."""

LOSS_LIMIT = 1e-3
"""Relative, of the same loss computed by other kernels in float32."""


def set_as_in_training() -> None:
    """Torch's switches as a training process on a GPU sets them (cluster.worker.process.prepare_process needs Ray).

    To be called before anything runs on the GPU: cuBLAS reads its variable once.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


class TrainingStep:
    """One step (forward, backward, clipping, AdamW) of the default model on a batch whose lists are at hand.

    A call does it and gives the loss.
    """

    def __init__(self, batch: CrystalBatch, backend: str, *, bfloat16: bool = False, compiled: str = "") -> None:
        """bfloat16: under autocast, as precision bf16 trains. compiled: torch.compile's backend, or none."""
        torch.manual_seed(0)
        model = Crystalformer(ModelConfig(), backend=backend).to(batch.device)
        model.freeze_statistics(batch)
        model.eval()  # nothing depends on it but the check for frozen statistics, which waits for the GPU
        self._batch = model.prepare(batch)
        self._model, self._bfloat16 = model, bfloat16
        on_gpu = batch.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=on_gpu, capturable=on_gpu)
        self._target = torch.randn(batch.num_crystals, 1).to(batch.device)
        self._forward: Callable[[CrystalBatch], Tensor] = model
        if compiled:
            self._forward = torch.compile(model, fullgraph=True, dynamic=True, backend=compiled)

    def __call__(self) -> Tensor:
        """The step."""
        self._optimizer.zero_grad(set_to_none=True)
        precision: AbstractContextManager[object] = nullcontext()
        if self._bfloat16:
            precision = torch.autocast(self._batch.device.type, dtype=torch.bfloat16)
        with precision:
            output = self._forward(self._batch)
        loss = (output.float() - self._target).abs().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()

    def weights(self) -> Tensor:
        """All parameters that the loss depends on, in one row, float64 on the CPU."""
        named = self._model.named_parameters()
        return torch.cat([p.detach().flatten() for name, p in named if not name.endswith(NO_GRADIENT)]).cpu().double()


def step_tasks(batch: CrystalBatch, repeats: int, *, deterministic: bool) -> list[Task]:
    """Milliseconds a step; torch_over_this: the torch backend's time over this row's, in the same mode."""
    device, mode = batch.device, "deterministic" if deterministic else "torch's defaults"
    known: list[float] = []

    def baseline() -> Row:
        known.append(median_ms(TrainingStep(batch, "torch"), repeats, device))
        return {"ms": known[0], "torch_over_this": 1.0}

    def timed(step: Callable[[], object]) -> Row:
        ms = median_ms(step, repeats, device)
        return {"ms": ms, "torch_over_this": known[0] / ms if known else None}

    tasks = [
        Task(f"torch, {mode}", baseline),
        Task(f"triton, {mode}", lambda: timed(TrainingStep(batch, "triton"))),
        Task(f"list of a new batch, {mode}", lambda: {"ms": median_ms(lambda: new_list(batch), repeats, device)}),
        Task(f"triton, bfloat16, {mode}", lambda: timed(TrainingStep(batch, "triton", bfloat16=True))),
    ]
    if device.type == "cuda":
        for backend in ("triton", "torch"):
            tasks.append(Task(f"peak memory, {backend}, {mode}", partial(peak_memory, batch, backend)))
        # Last: a capture that fails may leave torch in a state that the others would suffer from.
        tasks.append(Task(f"triton, one CUDA graph, {mode}", lambda: graph_row(batch, timed)))
    return tasks


def new_list(batch: CrystalBatch) -> object:
    """What the triton backend derives from a batch's neighbour list, once a batch."""
    radius = ModelConfig().neighbor_radius
    shells = batch.distinct(radius).shells(radius)
    shells.cache.pop("triton", None)
    return rows_of(shells)


def graph_row(batch: CrystalBatch, timed: Callable[[Callable[[], object]], Row]) -> Row:
    """The step as one graph: whether it is the eager step, then its time."""
    eager, captured = TrainingStep(batch, "triton"), TrainingStep(batch, "triton")
    start = eager.weights()
    replay = graphed(captured)
    for _ in range(GRAPH_WARM_UP + 2):
        expected = eager()
    for _ in range(2):
        found = replay()
    verdict = same_steps(start, (expected, eager.weights()), (found, captured.weights()))
    return {**verdict, **timed(replay)}


def same_steps(start: Tensor, expected: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]) -> Row:
    """Whether two runs of as many steps from the weights ``start`` end at one (loss, weights).

    relative_error: distance of the weights over the way that the expected ones went.
    """
    way = (expected[1] - start).norm()
    error = float((found[1] - expected[1]).norm() / way)
    loss, other = float(expected[0]), float(found[0])
    close = abs(other - loss) <= LOSS_LIMIT * abs(loss)
    return {
        "passed": close and float(way) > 0 and error < STEP_LIMIT,
        "loss": other,
        "eager_loss": loss,
        "relative_error": error,
        "limit": STEP_LIMIT,
        "bitwise": torch.equal(found[1], expected[1]) and other == loss,
    }


def peak_memory(batch: CrystalBatch, backend: str) -> Row:
    """Megabytes on the GPU at a step's peak, and before it: weights, moments and what is derived from the batch."""
    gc.collect()
    others = torch.cuda.memory_allocated(batch.device)
    step = TrainingStep(copy.deepcopy(batch), backend)  # a copy has nothing that other backends keep with a batch
    for _ in range(2):  # the first makes Adam's moments
        step()
    wait(batch.device)
    before = torch.cuda.memory_allocated(batch.device) - others
    torch.cuda.reset_peak_memory_stats(batch.device)
    step()
    wait(batch.device)
    peak = torch.cuda.max_memory_allocated(batch.device) - others
    return {"peak_mb": peak / 1e6, "before_mb": before / 1e6}


def compile_tasks(batch: CrystalBatch, repeats: int) -> list[Task]:
    """The triton step as training runs it, under torch.compile; last, since compiling may take the section's time."""
    backend = "inductor" if batch.device.type == "cuda" else "eager"

    def compiled() -> Row:
        loss = float(TrainingStep(batch, "triton")())
        step = TrainingStep(batch, "triton", compiled=backend)
        begin = time.perf_counter()
        other = float(step())
        seconds = time.perf_counter() - begin
        error = abs(other - loss) / abs(loss)
        verdict = {"passed": error < LOSS_LIMIT, "relative_error": error, "limit": LOSS_LIMIT}
        return {**verdict, "first_call_s": seconds, "ms": median_ms(step, repeats, batch.device)}

    return [Task(f"triton, torch.compile({backend}), deterministic", compiled)]
