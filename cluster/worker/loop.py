"""What a worker does: steps, validation, checkpoints, the final test."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.ahead import ahead
from cluster.data.dealing import deal, global_batches, micro_batches
from cluster.data.feed import Feed, TargetScaling
from cluster.data.tables import SharedTables, TablesOnDisk
from cluster.errors import RunFailed, UserError
from cluster.log import setup_logging, tell_warnings
from cluster.settings.config import TrainConfig
from cluster.worker.batch_norm import has_batch_norm, make_global, recomputing
from cluster.worker.breakdown import Breakdown
from cluster.worker.checkpoint import (
    AVERAGE,
    BEST,
    Best,
    CheckpointError,
    Outcome,
    Position,
    Tensors,
    TrainState,
    read_checkpoint,
)
from cluster.worker.collective import all_reduce
from cluster.worker.coordination import Coordinator, Order
from cluster.worker.engine import AveragedWeights, Engine, OptimizerState, learning_rate
from cluster.worker.evaluation import Evaluation, evaluate
from cluster.worker.fine_tuning import Initial
from cluster.worker.host import Host
from cluster.worker.machine import Place, device_name, peak_memory_mb
from cluster.worker.metrics import RunMetrics
from cluster.worker.monitor import Kind
from cluster.worker.saving import Saver
from crystalformer.batch import CrystalBatch
from crystalformer.model import Crystalformer

IntArray = npt.NDArray[np.int64]

STEP_MESSAGE_SECONDS = 2.0
"""A worker tells where it is in an epoch at most this often."""

COMPILING_SECONDS = 1.5
"""Kernels that are kept on disk are read in less."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What the driver hands to every worker."""

    config: Mapping[str, Any]
    """The run's settings, flat."""
    tables: Mapping[str, SharedTables | TablesOnDisk]
    radius: float
    """Å, of the shells."""
    scaling: TargetScaling
    threads: int
    """torch threads of a worker."""
    monitor: Any
    """The Monitor actor."""
    overlay: Mapping[str, Any] | None = None
    """DeepSpeed's settings of the user's file."""
    initial: Initial | None = None
    """The model that init_from names."""


class Worker:
    """One worker's part of a run."""

    def __init__(self, config: TrainConfig, job: Job, place: Place, host: Host) -> None:
        """Take up the latest checkpoint, or start with fresh weights and the first batch's statistics."""
        self._config, self._job, self._place, self._host = config, job, place, host
        setup_logging(rank=place.rank)
        tell_warnings((lambda text: self._send("note", text=text)) if place.rank == 0 else None)
        self._feeds = {
            split: Feed(tables.fetch(), config.data.target, job.radius, job.scaling)
            for split, tables in job.tables.items()
        }
        self._last_message = 0.0
        self._saver = Saver(host, place, job.config)
        self._coordinator = Coordinator(
            host, place, lambda: self._saver.written, config.scale.checkpoint_minutes * 60.0
        )
        self._metrics = RunMetrics(str(config.run.run_name), config.data.target, place)
        state = self._restored_state()
        model = Crystalformer(config.model, backend=config.scale.backend).to(place.device)
        self._warm_up(model)
        make_global(model)
        if state is None:
            self._begin(model)
        else:
            model.load_state_dict(state.weights)
        self._breakdown = Breakdown(place.device, enabled=config.scale.wall_clock_breakdown)
        self._engine = Engine(model, config, place, self._breakdown, job.overlay)
        self._position = Position() if state is None else state.position
        self._best = None if state is None else state.best
        self._best_weights = {} if state is None else state.best_weights
        self._rows: list[Mapping[str, Any]] = [] if state is None else list(state.rows)
        self._average: AveragedWeights | None = None
        if state is not None:
            self._engine.load_optimizer_state(OptimizerState(moments=state.moments, step=state.optimizer_step))
            if state.average_count:
                self._average = AveragedWeights(self._engine, state.average, state.average_count)
            self._send("history", rows=self._rows)
            self._send("note", text=f"resuming after step {state.position.step}, in epoch {state.position.epoch}")

    def _restored_state(self) -> TrainState | None:
        """The newest reported checkpoint that all workers can read; damaged ones are passed over with a note."""
        candidates = self._host.checkpoints()
        if not candidates:
            return None
        for checkpoint in candidates:
            state, problem = None, "another worker cannot read it"
            try:
                with checkpoint.as_directory() as folder:
                    state = read_checkpoint(Path(folder))
            except CheckpointError as error:
                problem = str(error)
            if float(all_reduce(torch.tensor(float(state is None)))) == 0:
                return state
            self._send("note", text=f"warning: checkpoint passed over: {problem}")
        raise CheckpointError(f"none of the run's {len(candidates)} checkpoints is whole; start a new run")

    def _warm_up(self, model: Crystalformer) -> None:
        """Compile kernels before the first epoch is timed; says so where they are not there from an earlier run."""
        text = "compiling the attention kernels, once on a machine"
        note = threading.Timer(COMPILING_SECONDS, lambda: self._send("note", text=text))
        note.start()
        try:
            with torch.autocast(self._place.device.type, torch.bfloat16, self._config.scale.precision == "bf16"):
                model.warm_up()
        finally:
            note.cancel()

    def _begin(self, model: Crystalformer) -> None:
        """Weights and statistics of a run without checkpoint: those of init_from's model, or the first batch's."""
        if self._config.run.init_from is None:
            self._freeze_statistics(model)
        elif self._job.initial is not None:
            self._job.initial.into(model, self._job.scaling)
        else:
            raise UserError(f"init_from {self._config.run.init_from}: the model was not handed to this worker")

    def _freeze_statistics(self, model: Crystalformer) -> None:
        """s and t of every layer, over the global first batch."""
        feed, config = self._feeds["train"], self._config
        first = global_batches(feed.num_rows, config.data.batch_size, config.run.seed, 1)[0]
        rows = deal(first, feed.costs[first], self._place.world_size)[self._place.rank]
        model.freeze_statistics(feed.batch(rows, self._place.device)[0], all_reduce)

    def close(self) -> None:
        """Nothing is told of this worker, or written by it, from now on."""
        self._saver.close()
        self._metrics.close()
        tell_warnings(None)

    # Training --------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The metrics rows of the epochs that are done, those before a checkpoint included."""
        return self._rows

    def run(self) -> None:
        """Train from the current position to the end, test, and report the final checkpoint.

        A trial of a search has no test split: its rows are all that it is to give.
        """
        for _ in self.epochs():
            pass
        if self._position.epoch <= self._config.optim.epochs:
            return
        if "test" in self._feeds:
            self._finish()
        else:
            self._save()
            self._saver.register()

    def epochs(self) -> Iterator[Mapping[str, Any]]:
        """Train epoch by epoch, giving each one's metrics row; ends early, after a checkpoint, where told to stop."""
        epochs = self._config.optim.epochs
        for epoch in range(self._position.epoch, epochs + 1):
            if not self._train_epoch(epoch):
                return
            yield self._rows[-1]
            if epoch < epochs and epoch % self._config.scale.checkpoint_every == 0:
                self._save()

    def _train_epoch(self, epoch: int) -> bool:
        """One epoch, or what is left of it, and its validation. False where the run stops, after a checkpoint."""
        config, feed, position = self._config, self._feeds["train"], self._position
        batches = global_batches(feed.num_rows, config.data.batch_size, config.run.seed, epoch)
        averaging = epoch > config.optim.epochs - config.optim.averaged_epochs
        start = time.monotonic()
        loss = torch.zeros((), dtype=torch.float64, device=self._place.device)
        waited, step = 0.0, position.step
        coming = self._coming(batches[position.batch :])
        for number in range(position.batch, len(batches)):
            asked = time.monotonic()
            with self._breakdown.part("data"):
                parts = next(coming)
            waited += time.monotonic() - asked
            loss += self._engine.step(parts, config.data.batch_size, self._rate(step, len(batches)))
            step += 1
            if averaging:
                self._take_average()
            self._metrics.step(step, time.monotonic() - asked)
            self._send_step(epoch, number + 1, len(batches))
            order = self._coordinator.order(step)
            if order is Order.REGISTER:
                self._saver.register()
            elif order is not Order.GO_ON:
                so_far = position.loss + float(all_reduce(loss.clone()))
                seconds = position.seconds + time.monotonic() - start
                self._position = Position(epoch=epoch, batch=number + 1, step=step, loss=so_far, seconds=seconds)
                self._save()
                if order is Order.STOP:
                    self._saver.register()
                    return False
        whole_loss = position.loss + float(all_reduce(loss))  # waits for what is still under way on a GPU
        trained = time.monotonic() - start
        row: dict[str, Any] = {
            "epoch": epoch,
            "step": step,
            "lr": self._rate(step - 1, len(batches)),
            "train_loss": whole_loss / len(batches),
            "grad_norm": self._engine.gradient_norm,
            "structures_per_s": (len(batches) - position.batch) * config.data.batch_size / trained,
            "data_wait_s": waited,
        }
        if not math.isfinite(row["train_loss"]):
            rate = self._config.optim.lr
            self._metrics.diverged()
            raise RunFailed(
                f"training diverged in epoch {epoch}: the loss is {row['train_loss']}; try --lr below {rate}"
            )
        with self._breakdown.part("validation"):
            row["val_mae"] = self._validate(epoch)
        if parts_seconds := self._breakdown.take():
            row["seconds_of"] = parts_seconds
        seconds = position.seconds + time.monotonic() - start
        self._position = Position(epoch=epoch + 1, step=step, seconds=seconds)
        row["seconds"] = seconds
        self._rows.append(row)
        if self._place.rank == 0:
            self._metrics.row(row)
        self._send("row", row=row)
        return True

    def _rate(self, step: int, steps_an_epoch: int) -> float:
        """The learning rate of a step; while weights are averaged it stays that of the first averaged step."""
        optim = self._config.optim
        held = (optim.epochs - optim.averaged_epochs) * steps_an_epoch
        return learning_rate(optim, min(step, held) if optim.averaged_epochs else step)

    def _coming(self, batches: Sequence[IntArray]) -> Iterator[list[tuple[CrystalBatch, Tensor]]]:
        """This worker's share of each batch. A GPU has the next one copied meanwhile; a CPU's cores have no time."""
        shares = (self._parts(batch) for batch in batches)
        return ahead(shares) if self._place.device.type == "cuda" else shares

    def _parts(self, batch: IntArray) -> list[tuple[CrystalBatch, Tensor]]:
        """This worker's share of a global batch, in as many parts as gradients are accumulated over."""
        feed = self._feeds["train"]
        parts = micro_batches(batch, feed.costs, self._place.world_size, self._config.optim.gradient_accumulation)
        return [feed.batch(part[self._place.rank], self._place.device) for part in parts]

    def _take_average(self) -> None:
        if self._average is None:
            self._average = AveragedWeights(self._engine)
        self._average.update()

    def _validate(self, epoch: int) -> dict[str, float]:
        """Validation MAE by target in its unit; the best epoch's weights are kept."""
        evaluation = self._evaluate("val")
        errors = evaluation.mae(self._job.scaling, self._config.data.target)
        # A first epoch that diverged to NaN must not stand in the way of finite ones.
        if np.isfinite(evaluation.score) and (self._best is None or evaluation.score < self._best.score):
            self._best = Best(epoch=epoch, score=evaluation.score, mae=errors)
            self._best_weights = self._engine.weights()
        return errors

    def _evaluate(self, split: str) -> Evaluation:
        return evaluate(self._engine, self._feeds[split], self._place)

    # Ending ----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Test the best-validation and the averaged weights, and report the final checkpoint with the outcome."""
        if self._best is None:
            raise RunFailed("no epoch gave a finite validation error: training diverged; try a lower --lr")
        models = {BEST: self._best_weights}
        if self._average is not None:
            models[AVERAGE] = self._averaged_weights(self._average)
        arrays: Tensors = {}
        for name, weights in models.items():
            with self._engine.loaded(weights):
                evaluation = self._evaluate("test")
            arrays[name] = torch.from_numpy(self._job.scaling.restore(evaluation.prediction))
        facts = {
            "world_size": self._place.world_size,
            "device": device_name(self._place.device),
            "num_parameters": self._num_parameters,
            "peak_memory_mb": float(all_reduce(torch.tensor(peak_memory_mb(self._place.device)), maximum=True)),
        }
        self._save(Outcome(facts=facts, models=models, predictions=arrays))
        self._saver.register()

    def _averaged_weights(self, average: AveragedWeights) -> Tensors:
        """The average in full; its batch-norm statistics are those of the train split under it."""
        weights = self._engine.gathered(average.shards)
        if not has_batch_norm(self._engine.module):
            return weights
        feed, config = self._feeds["train"], self._config
        with self._engine.loaded(weights), recomputing(self._engine.module), torch.no_grad():
            for batch in global_batches(feed.num_rows, config.data.batch_size, config.run.seed, config.optim.epochs):
                for crystals, _ in self._parts(batch):
                    self._engine.module(crystals)
            return self._engine.weights()

    @property
    def _num_parameters(self) -> int:
        # a fresh model: at ZeRO 3 the engine's own parameters are empty
        return Crystalformer(self._config.model).num_parameters

    # Reporting -------------------------------------------------------------------------------------------------

    def _save(self, outcome: Outcome | None = None) -> None:
        """Begin a checkpoint of the whole state as it is now."""
        optimizer = self._engine.optimizer_state()
        average = {} if self._average is None else self._engine.gathered(self._average.shards)
        state = TrainState(
            position=self._position,
            weights=self._engine.weights(),
            moments=optimizer.moments,
            optimizer_step=optimizer.step,
            average=average,
            average_count=0 if self._average is None else self._average.count,
            best=self._best,
            best_weights=self._best_weights,
            rows=tuple(self._rows),
        )
        self._saver.begin(state, outcome)
        self._coordinator.saved()

    def _send(self, kind: Kind, **content: Any) -> None:  # noqa: ANN401 - plain values of a message
        if self._place.rank == 0:
            self._host.send({"kind": kind, **content})

    def _send_step(self, epoch: int, done: int, total: int) -> None:
        if time.monotonic() - self._last_message >= STEP_MESSAGE_SECONDS:
            self._last_message = time.monotonic()
            self._send("step", epoch=epoch, done=done, total=total)
