"""What a run's processes do not load or start, as each takes a second or more of them."""

import subprocess
import sys

import ray
from ray.train import ScalingConfig

from cluster.launch import _Trainer
from cluster.session import own_session, ray_session


def test_deepspeed_is_loaded_without_mlflow_which_can_still_be_loaded():
    code = (
        "import sys; from cluster.engine import _deepspeed; assert _deepspeed().initialize;"
        "assert not any(name.split('.')[0] == 'mlflow' for name in sys.modules); import mlflow; mlflow.MlflowClient"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def callbacks() -> set[str]:
    trainer = _Trainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
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
