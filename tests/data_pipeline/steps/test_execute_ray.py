"""Ray Data's own cluster, and nobody else's."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
