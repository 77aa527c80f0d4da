"""The README's Slurm script in bash: Slurm, Ray and the training are stand-ins, which write down what was asked."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
SCRIPT = re.search(r"^\$ cat \S+\.sbatch\n(.*?)^\$ sbatch ", README, re.MULTILINE | re.DOTALL)[1]
NODES = int(re.search(r"--nodes=(\d+)", SCRIPT)[1])
SECONDS = 120
STANDS_IN = {
    "bin/scontrol": "printf 'node%s\\n' 1 2 3 4",
    "bin/getent": "echo 10.0.0.1 node1",
    "bin/sleep": "",
    "bin/srun": 'echo "srun($SRUN_CPUS_PER_TASK) $*" >>log',
    # The head answers when it is asked for the third time.
    ".venv/bin/ray": 'echo "ray $*" >>log; (($(grep -c "^ray health-check" log) > 2))',
    ".venv/bin/crystalformer": """echo "crystalformer $*" >>log
trap 'echo checkpoint >>log; exit 143' TERM
[[ -e hold ]] && touch held && while :; do /bin/sleep 0.1; done
true""",
}
RAY = """
def init(): print("ray.init", file=open("log", "a"), flush=True)
def nodes():
    asked, most = open("log").read().count("ray.init"), int(open("most").read())
    return [{"Alive": number < min(asked, most)} for number in range(4)]
"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as Slurm would, with so many nodes that come, one at every look."""

    def start(most: int) -> subprocess.Popen[str]:
        for name, text in STANDS_IN.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)
        (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
        (tmp_path / "ray.py").write_text(RAY)
        (tmp_path / "most").write_text(str(most))
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_JOB_NODELIST": "node[1-4]",
            "SLURM_JOB_NUM_NODES": str(NODES),
        }
        return subprocess.Popen(
            ["bash", "-c", SCRIPT.replace("SECONDS + 600", "SECONDS + 4")],
            cwd=tmp_path,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_the_training_begins_when_all_nodes_are_there_and_on_gpus(job, tmp_path):
    running = job(most=NODES)
    _, told = running.communicate(timeout=SECONDS)
    assert running.returncode == 0, told
    log = (tmp_path / "log").read_text().splitlines()
    assert log.count("ray health-check") == 3
    assert log.count("ray.init") == NODES, "asked until the last is there"
    assert log.index("ray.init") > max(index for index, line in enumerate(log) if line == "ray health-check")
    assert log[-1].startswith("crystalformer train ")
    assert " --device cuda " in log[-1]
    workers = re.search(r"--num_workers (\d+)", log[-1])[1]
    assert int(workers) == NODES * int(re.search(r"--gpus-per-node=(\d+)", SCRIPT)[1])


def test_ray_is_told_what_slurm_gave(job, tmp_path):
    job(most=NODES).communicate(timeout=SECONDS)
    head, others = sorted(line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("srun"))[
        ::-1
    ]
    if "--head" not in head:
        head, others = others, head
    for line in (head, others):
        assert line.startswith("srun(64) ")
        assert " --num-cpus=64 --num-gpus=8 --block " in line
    assert "--nodes=1 --ntasks=1 -w node1 " in head and head.endswith(" --head --port=6379")
    assert f"--nodes={NODES - 1} --ntasks={NODES - 1} -x node1 " in others and others.endswith(
        " --address=10.0.0.1:6379"
    )


def test_a_node_that_does_not_come_ends_the_job(job, tmp_path):
    running = job(most=0)
    _, told = running.communicate(timeout=SECONDS)
    assert running.returncode == 1
    assert "error: gave up: .venv/bin/python" in told
    assert "crystalformer" not in (tmp_path / "log").read_text()


def test_slurms_warning_reaches_the_training(job, tmp_path):
    (tmp_path / "hold").touch()
    running = job(most=NODES)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=SECONDS)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "checkpoint"
