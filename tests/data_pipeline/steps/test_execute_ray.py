"""Ray Data's own cluster, and nobody else's."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray.data  # noqa: F401 - configures its loggers

from data_pipeline.steps.execute import quiet_ray_data

START = """
import ray
from data_pipeline.steps.ray_address import join_or_start
join_or_start(log_to_driver=False)
print("nodes", len(ray.nodes()), ray.get_runtime_context().gcs_address)
"""


def test_a_cluster_that_was_started_here_before_is_left_alone():
    """Ray notes the last cluster of a machine; joining one that is gone, or a stranger's, would hang or intrude."""
    with tempfile.TemporaryDirectory(prefix="r-") as folder:  # short: sockets' paths may have 107 characters
        note = Path(folder) / "ray" / "ray_current_cluster"
        note.parent.mkdir()
        note.write_text("127.0.0.1:1")
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        done = subprocess.run(
            [sys.executable, "-c", START],
            env=environment | {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("nodes 1 ") and not done.stdout.endswith(" 127.0.0.1:1\n")


@pytest.fixture
def ray_data_logger():
    logger = logging.getLogger("ray.data")
    before = [(handler, handler.level) for handler in logger.handlers]
    yield logger
    for handler in set(logger.handlers) - {handler for handler, _ in before}:
        logger.removeHandler(handler)
    for handler, level in before:
        handler.setLevel(level)


def test_the_terminal_alone_is_spared_ray_datas_notes(ray_data_logger, tmp_path):
    """A handler of the user's, or of the tests' own, goes on taking all it took."""
    own = [logging.StreamHandler(), logging.FileHandler(tmp_path / "log")]
    for handler in own:
        ray_data_logger.addHandler(handler)
    quiet_ray_data()
    levels = {handler.get_name(): handler.level for handler in ray_data_logger.handlers if handler not in own}
    assert levels["console"] == logging.ERROR and levels["file"] == logging.NOTSET
    assert [handler.level for handler in own] == [logging.NOTSET] * 2
    own[1].close()
