"""What went wrong: in a trial's settings, or in what all trials share."""

import errno
import shutil
import time

import pytest
import ray
from ray import tune as ray_tune

from cluster.errors import RunFailed, UserError
from data_pipeline.errors import DataError
from data_pipeline.prepared import load_prepared
from tune.failures import NoTrialCan, of_every_trial, told, without_data
from tune.library import Library
from tune.worker import Trial, TrialSetup

FULL = OSError(errno.ENOSPC, "No space left on device", "/runs/a")


@pytest.mark.parametrize(
    ("error", "every", "text"),
    [
        (FULL, True, "/runs/a: No space left on device"),
        (DataError("data set salts: gone"), True, "data set salts: gone"),
        (UserError("num_workers 2: they need a CPU each"), True, "num_workers 2: they need a CPU each"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False, "OSError: [Errno 12] Cannot allocate memory"),
        (RunFailed("training diverged in epoch 3"), False, "training diverged in epoch 3"),
        (RuntimeError("shapes differ"), False, "RuntimeError: shapes differ"),
    ],
)
def test_what_any_other_trial_would_meet(error, every, text):
    assert (of_every_trial(error), told(error)) == (every, text)


@ray.remote(num_cpus=0)
class Failing:
    """Raises what it is given."""

    def data(self, error):
        raise error

    def wait(self):
        time.sleep(600)


def raised(reference):
    with pytest.raises(ray.exceptions.RayError) as caught:
        ray.get(reference)
    return without_data(caught.value)


def test_the_cause_is_told_and_not_rays_traceback(address):
    actor = Failing.remote()
    for error in (UserError("/data/x.arrow cannot be read"), FULL):
        found = raised(actor.data.remote(error))
        assert str(found) == f"the trials' data cannot be had: {told(error)}" and of_every_trial(found)
    large = raised(actor.data.remote(MemoryError("40 GB")))
    assert told(large) == "MemoryError: 40 GB" and not of_every_trial(large)
    waiting = actor.wait.remote()  # a call made behind the kill may be answered before it
    ray.kill(actor)
    gone = raised(waiting)
    assert isinstance(gone, NoTrialCan) and "ActorDiedError: The actor" in str(gone) and "\n" not in str(gone)


def test_a_trial_without_its_data_is_stuck_and_does_not_fail(address, settings, data_dir, tmp_path):
    shutil.copytree(data_dir / "salts", tmp_path / "salts", ignore=shutil.ignore_patterns("*.arrow"))
    library = Library.remote(load_prepared(tmp_path, "salts"), ("gap",), 6.0, 0)
    shutil.rmtree(tmp_path / "salts" / "train")
    setup = TrialSetup(
        base={**settings, "run_name": "s", "storage_path": str(tmp_path)},
        objective="gap",
        library=library,
        threads=1,
        seconds=60.0,
        units={"gap": "eV"},
        overlay=None,
    )
    trial = ray_tune.with_parameters(Trial, shared=setup)({"number": 3, "settings": {}})
    result = trial.step()
    assert (result["ended"], result["number"], result["done"]) == ("stuck", 3, True)
    assert result["reason"].startswith("the trials' data cannot be had: ")
    assert "Traceback" not in result["reason"] and str(tmp_path / "salts" / "train") in result["reason"]
