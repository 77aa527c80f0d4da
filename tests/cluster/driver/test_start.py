"""What a run's processes do not load or start, as each takes a second or more of them."""

import subprocess
import sys

import numpy as np
import pytest
import ray
import torch
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, create_scaling_policy

from cluster.data.tables import SplitTables
from cluster.driver.launch import _Trainer
from cluster.driver.scaling import Alone, Saving, policy_of
from cluster.session import own_session, ray_session
from cluster.settings.config import TrainConfig
from cluster.worker.engine import Engine
from cluster.worker.machine import Place
from crystalformer.model import Crystalformer
from tests.cluster.processes import Workers
from tests.cluster.small import small_config, small_crystals
from tests.cluster.worker.test_engine import feed_of


def in_a_fresh_process(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_deepspeed_is_loaded_without_mlflow_which_can_still_be_loaded():
    in_a_fresh_process(
        "import sys; from cluster.worker.lean import load_deepspeed; assert load_deepspeed().initialize;"
        "assert not any(name.split('.')[0] == 'mlflow' for name in sys.modules); import mlflow; mlflow.MlflowClient"
    )


def test_a_worker_steps_without_pytorchs_compiler_which_can_still_be_used(small_tables, tmp_path):
    fresh = Workers(1, str(tmp_path))
    try:
        flat = small_config().to_flat()
        before, after = fresh.run(compiler_is_there, small_crystals(small_tables["train"], 24), flat)[0]
    finally:
        fresh.close()
    assert (before, after) == (False, True)


def compiler_is_there(place: Place, tables: SplitTables, flat: dict) -> tuple[bool, bool]:
    """After steps and a checkpoint's state, and after something was compiled."""
    config, feed = TrainConfig.from_flat(flat), feed_of(tables)
    batch = feed.batch(np.arange(8), place.device)
    model = Crystalformer(config.model)
    model.freeze_statistics(batch[0])
    engine = Engine(model, config, place)
    for _ in range(2):
        engine.step([batch], 8, 1e-3)
        engine.load_optimizer_state(engine.optimizer_state())
    assert engine.gradient_norm > 0
    before = "torch._dynamo" in sys.modules
    weight = torch.ones(3, requires_grad=True)
    torch.compile(lambda: weight.square().sum(), backend="eager", fullgraph=True)().backward()
    optimizer = torch.optim.AdamW([weight], lr=1.0, weight_decay=0.0)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)
    return before, "torch._dynamo" in sys.modules


def callbacks() -> set[str]:
    trainer = _Trainer(None, train_loop_per_worker=lambda: None, scaling_config=ScalingConfig(num_workers=1))
    return {type(callback).__name__ for callback in trainer._create_default_callbacks()}


def test_a_run_on_a_ray_of_its_own_starts_no_process_that_cleans_up(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    elsewhere = callbacks()
    assert "PlacementGroupCleanerCallback" in elsewhere and "DatasetsCallback" not in elsewhere
    with ray_session():
        assert own_session()
        assert elsewhere - callbacks() == {"PlacementGroupCleanerCallback"}
        with ray_session():  # another's, from here
            pass
        assert ray.is_initialized()
    assert not own_session()


def test_workers_of_a_range_grow_after_a_checkpoint_and_a_fixed_number_asks_nobody_for_nodes():
    fixed, elastic = ScalingConfig(num_workers=2), ScalingConfig(num_workers=(1, 3))
    assert type(policy_of(create_scaling_policy(fixed), None, own_session=True)) is Alone
    assert type(policy_of(create_scaling_policy(fixed), None, own_session=False)) is FixedScalingPolicy
    for own in (True, False):
        policy = policy_of(create_scaling_policy(elastic), None, own_session=own)
        assert type(policy) is Saving and policy.scaling_config is elastic
