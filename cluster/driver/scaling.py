"""How many workers a run has from moment to moment: Ray Train's policies, where a run of ours needs another."""

from __future__ import annotations

import time
from typing import Any

from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)


class Alone(FixedScalingPolicy):
    """On a Ray that this process has started: no autoscaler is there to be asked for nodes.

    Ray Train would start a process to ask it through, a second of CPU before the first worker.
    """

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ANN401 - Ray's
        """Nobody is told."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody is asked."""


class Saving(ElasticScalingPolicy):
    """Asks for a checkpoint when there is room for more workers, and takes them in the next time it looks.

    Ray Train ends the workers at once and begins with more where the last checkpoint left off: nodes that come one by
    one would each cost all the steps since then.
    """

    def __init__(self, given: ScalingPolicy, monitor: Any) -> None:  # noqa: ANN401 - a Ray actor handle
        """``given``: Ray's own policy of the run, whose settings are taken over. ``monitor``: hears the wish."""
        super().__init__(given.scaling_config)
        self._monitor = monitor
        self._asked = float("-inf")

    def make_decision_for_running_worker_group(
        self,
        worker_group_state: Any,  # noqa: ANN401 - Ray's
        worker_group_status: Any,  # noqa: ANN401 - Ray's
    ) -> ScalingDecision:
        """Ray's decision, but that growth waits for a checkpoint asked for a look ago."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision) or decision.num_workers <= worker_group_state.num_workers:
            return decision
        asked, self._asked = self._asked, time.monotonic()
        if self._asked - asked <= 2 * self.scaling_config.elastic_resize_monitor_interval_s:
            return decision
        self._monitor.save.remote()
        return NoopDecision()


def policy_of(given: ScalingPolicy, monitor: Any, *, own_session: bool) -> ScalingPolicy:  # noqa: ANN401 - an actor
    """The policy of a run, in place of what Ray Train has ``given`` it.

    monitor: the run's Monitor. own_session: as cluster.session says.
    """
    if isinstance(given, ElasticScalingPolicy):
        return Saving(given, monitor)
    return Alone(given.scaling_config) if own_session else given
