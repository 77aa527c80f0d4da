"""What a Ray Train worker knows of the run's folder before it trains."""

import json
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

import cluster  # noqa: F401 - sets Ray's environment
from cluster import host
from cluster.errors import UserError
from cluster.files import dump_yaml, write_text


def look(settings):
    """In a worker: whether each of the settings is that of the run's folder."""
    host.SEE_SECONDS = 0.6
    answers = []
    for config in settings["asked"]:
        try:
            host.RayTrainHost(None).see_run_folder(config)
            answers.append("seen")
        except UserError as error:
            answers.append(str(error))
    Path(settings["answers"]).write_text(json.dumps(answers))


def test_a_node_that_does_not_see_the_runs_folder_says_so(tmp_path):
    """Of the folder of another run under the same name too, which a disk of its own may hold."""
    mine, other = {"run_name": "night", "seed": 1}, {"run_name": "night", "seed": 2}
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        answers = []
        for written in (None, mine):
            if written is not None:
                write_text(tmp_path / "night" / "config.yaml", dump_yaml(written))
            trainer = TorchTrainer(
                look,
                train_loop_config={"asked": [mine, other], "answers": str(tmp_path / "answers.json")},
                torch_config=TorchConfig(backend="gloo"),
                scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(name="night", storage_path=str(tmp_path)),
            )
            trainer.fit()
            answers += json.loads((tmp_path / "answers.json").read_text())
    finally:
        ray.shutdown()
    assert [answer == "seen" for answer in answers] == [False, False, True, False]
    assert f"does not see the run's files in {tmp_path / 'night'}; give a --storage_path that all" in answers[0]
