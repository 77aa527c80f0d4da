"""A Ray cluster of two nodes on this machine, as KubeRay starts one: a head without CPUs, one worker, a token."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 90


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class LocalRay:
    """``ray start --block`` twice; ``close`` ends these processes and theirs, and nothing else on the machine."""

    def __init__(self, cpus: int = 2) -> None:
        """Start both nodes and wait until the head answers."""
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's socket paths may have 107 characters
        self.token = secrets.token_hex(16)
        gcs, self.dashboard_port, self.head_metrics, self.worker_metrics, *agents = free_ports(8)
        self.address, self.dashboard = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{self.dashboard_port}"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_JOB_STOP_WAIT_TIME_S": "120",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_metrics_report_interval_ms": "1000",
        }
        head = ["--head", f"--port={gcs}", f"--dashboard-port={self.dashboard_port}", "--num-cpus=0"]
        head += [
            f"--temp-dir={self.folder}",
            f"--metrics-export-port={self.head_metrics}",
            "--node-ip-address=127.0.0.1",
        ]
        worker = [f"--address={self.address}", f"--num-cpus={cpus}", f"--metrics-export-port={self.worker_metrics}"]
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            self._start("head", [*head, *_agent(agents[:2])])
            self.run(["ray", "health-check", "--address", self.address], until=START_SECONDS)
            self._start("worker", [*worker, *_agent(agents[2:])])
            self.node_address = socket.gethostbyname(socket.gethostname())
        except BaseException:
            self.close()
            raise

    def _start(self, name: str, words: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *words]
            self._processes.append(
                subprocess.Popen(
                    command, stdout=log, stderr=log, env=self.environment, cwd=REPOSITORY, start_new_session=True
                )
            )

    def run(self, words: list[str], *, until: float = 0.0) -> str:
        """The output of a command that succeeds, at the latest after ``until`` seconds of trying."""
        deadline = time.monotonic() + until
        while True:
            done = subprocess.run(words, env=self.environment, capture_output=True, text=True, cwd=self.folder)
            if done.returncode == 0:
                return done.stdout
            if time.monotonic() > deadline:
                raise RuntimeError(f"{words}: {done.stdout}{done.stderr}\n{(self.folder / 'head.log').read_text()}")
            time.sleep(0.5)

    def close(self) -> None:
        """End what was started, the worker first, and all that it started."""
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._processes):
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _agent(ports: list[int]) -> list[str]:
    return [f"--dashboard-agent-listen-port={ports[0]}", f"--dashboard-agent-grpc-port={ports[1]}"]
