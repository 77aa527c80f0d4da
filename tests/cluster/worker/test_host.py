"""What a Ray Train worker knows of the run's folder before it trains."""

import json
from pathlib import Path

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from cluster.errors import UserError
from cluster.files import dump_yaml, write_text
from cluster.worker import host
from tests.cluster.local_ray import local_ray


def look(settings):
    """In a worker: whether the folder shows each of the settings, before it holds a config.yaml and after."""
    host.SEE_SECONDS = 0.6
    answers = []
    for written in (None, settings["asked"][0]):
        if written is not None:
            write_text(Path(settings["folder"]) / "config.yaml", dump_yaml(written))
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
    folder, answers = tmp_path / "night", tmp_path / "answers.json"
    with local_ray(1):
        TorchTrainer(
            look,
            train_loop_config={"asked": [mine, other], "folder": str(folder), "answers": str(answers)},
            torch_config=TorchConfig(backend="gloo"),
            scaling_config=ray.train.ScalingConfig(num_workers=1),
            run_config=ray.train.RunConfig(name="night", storage_path=str(tmp_path)),
        ).fit()
    found = json.loads(answers.read_text())
    assert [answer == "seen" for answer in found] == [False, False, True, False]
    assert f"does not see the run's files in {folder}; give a --storage_path that all" in found[0]
