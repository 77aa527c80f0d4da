"""A worker as a process of Ray Train: how it is set up, and who hears of what went wrong in it."""

from __future__ import annotations

import os
from contextlib import closing

import ray.train
import ray.train.torch
import torch

from cluster.errors import RunFailed, UserError, in_a_line
from cluster.settings.config import TrainConfig
from cluster.worker.checkpoint import CheckpointError
from cluster.worker.host import Host, RayTrainHost
from cluster.worker.loop import Job, Worker
from cluster.worker.machine import Place


def run_worker(job: Job) -> None:
    """Entry point of a Ray Train worker."""
    config = TrainConfig.from_flat(job.config)
    context = ray.train.get_context()
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device() if config.scale.device != "cpu" else torch.device("cpu"),
    )
    prepare_process(config, job.threads, place.device)
    host = RayTrainHost(job.monitor)
    if host.failed():  # started once more after a failure that no restart can mend
        return
    try:
        host.see_run_folder(job.config)
        with closing(_ready(config, job, place, host)) as worker:
            worker.run()
    except RunFailed as failure:  # on every worker alike
        if place.rank == 0:
            host.send({"kind": "failed", "text": str(failure)})
    except (UserError, CheckpointError) as error:  # the others may wait for this worker: Ray Train ends them
        host.send({"kind": "failed", "text": str(error)})
        host.flush()
        raise
    finally:
        host.flush()


def _ready(config: TrainConfig, job: Job, place: Place, host: Host) -> Worker:
    """The Worker. UserError where a value, as of the user's DeepSpeed file, cannot be, and never will."""
    try:
        return Worker(config, job, place, host)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(in_a_line(error)) from error


def prepare_process(config: TrainConfig, threads: int, device: torch.device) -> None:
    """Threads, seed and determinism of this process, before a Worker is made in it."""
    torch.set_num_threads(threads)
    torch.manual_seed(config.run.seed)
    os.environ["DS_ACCELERATOR"] = device.type  # or DeepSpeed takes a GPU wherever the machine has one
    # On a CPU everything used here is deterministic as it is, and torch's switch makes index_add ten times slower.
    if config.run.deterministic and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)  # noqa: FBT003 - torch's signature
        # The switch fills all memory that is asked for empty, a launch each time; what is asked for here is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
