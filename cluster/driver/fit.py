"""TorchTrainer.fit, followed from outside: begun once there is room, ended where nobody wants it any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from cluster.driver.actors import give_back_reservations, kill_actors
from cluster.errors import RunFailed, in_a_line

END_SECONDS = 10.0
"""For Ray Train to end once its controller is killed."""

_CONTROLLER_CLASS = "TrainController"


class Fit:
    """A run of Ray Train in a thread of its own: Ray then leaves the signals to us."""

    def __init__(self, make: Callable[[], TorchTrainer], *, with_tasks: bool) -> None:
        """``make`` gives the trainer, in that thread. ``with_tasks``: it runs tasks of Ray, which wait for a CPU.

        A task that does nothing waits in their stead, as a thread that waits in Ray for a task cannot be ended.
        """
        self._thread = threading.Thread(target=self._run, name="ray-train-fit", daemon=True)
        self._make = make
        # A lambda travels whole; a function of this module would have its process import all of Ray Train first.
        self._room = ray.remote(lambda: None).remote() if with_tasks else None
        self._result: Any = None
        self._error: Exception | None = None

    def under_way(self, seconds: float) -> bool:
        """Wait that long at most; whether there is more to wait for. The run begins once its tasks have room."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
            return self._thread.is_alive()
        if self._room is None or ray.wait([self._room], timeout=seconds)[0]:
            self._thread.start()
        return True

    def end(self) -> None:
        """Give up: Ray Train's controller is killed, its workers with it, and their place on the cluster given back.

        A process that leaves Ray while a thread of it waits there is ended by Ray, whatever it still has to say.
        """
        if self._room is not None:
            ray.cancel(self._room, force=True)
        if not self._thread.is_alive():
            return
        deadline = time.monotonic() + END_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:
            kill_actors(_CONTROLLER_CLASS)
            self._thread.join(0.5)
        give_back_reservations()

    def result(self) -> Any:  # noqa: ANN401 - Ray's Result
        """What fit returned. RunFailed says in a line why it failed; its cause tells all."""
        if self._error is not None:
            raise RunFailed(f"training failed: {_reason(self._error)}; --debug tells more") from self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._make().fit()
        except Exception as error:  # noqa: BLE001 - raised again by result()
            self._error = error


def _reason(error: Exception) -> str:
    """The first worker's error, or the controller's, without its traceback."""
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.items()), None) if failures else None
    if first is not None:
        rank, error = first
        return f"worker {rank}: {in_a_line(error)}"
    return in_a_line(getattr(error, "controller_failure", error))
