"""How many workers a run has from moment to moment: Ray Train's policies, where a run of ours needs another."""

from __future__ import annotations

from typing import Any

from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ScalingPolicy


class Alone(FixedScalingPolicy):
    """On a Ray that this process has started: no autoscaler is there to be asked for nodes.

    Ray Train would start a process to ask it through, a second of CPU before the first worker.
    """

    def after_controller_start(self, train_run_context: Any) -> None:  # noqa: ANN401 - Ray's
        """Nobody is told."""

    def _maybe_send_resource_request(self) -> None:
        """Nobody is asked."""


def policy_of(given: ScalingPolicy, *, own_session: bool) -> ScalingPolicy:
    """The policy of a run, in place of what Ray Train has ``given`` it. ``own_session``: as cluster.session says."""
    if own_session and isinstance(given, FixedScalingPolicy):
        return Alone(given.scaling_config)
    return given
