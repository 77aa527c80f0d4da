"""A Ray cluster of two nodes on this machine, as KubeRay starts one: a head without CPUs, one worker, a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
START_SECONDS = 240


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
            "CRYSTALFORMER_LEAVING": str(self.folder / "leaving"),
        }
        self.node_address = socket.gethostbyname(socket.gethostname())
        head = ["--head", f"--port={gcs}", f"--dashboard-port={self.dashboard_port}", "--num-cpus=0"]
        head += [f"--temp-dir={self.folder}", f"--metrics-export-port={self.head_metrics}"]
        self._worker = [f"--address={self.address}", f"--num-cpus={cpus}"]
        self._worker += [f"--metrics-export-port={self.worker_metrics}", *_agent(agents[2:])]
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        try:
            self._start("head", [*head, *_agent(agents[:2])])
            self.run(["ray", "health-check", "--address", self.address], until=START_SECONDS)
            # The dashboard, which takes jobs, comes after the control store.
            self.run(["ray", "job", "list", "--address", self.dashboard], until=START_SECONDS)
            self.start_worker()
        except BaseException:
            self.close()
            raise

    def start_worker(self) -> None:
        """Start the worker."""
        self._start("worker", self._worker)

    def end_worker(self) -> None:
        """SIGTERM to the worker, as the kubelet sends it after preStop."""
        _end([self._nodes.pop("worker")])

    def worker_id(self) -> str:
        """Ray's name of the worker's node that is alive."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            for node in self.ask("api/v0/nodes")["data"]["result"]["result"]:
                if node["state"] == "ALIVE" and not node["is_head_node"]:
                    return str(node["node_id"])
            time.sleep(0.5)
        raise RuntimeError((self.folder / "worker.log").read_text())

    def _start(self, name: str, words: list[str]) -> None:
        environment = dict(self.environment)
        if name == "head":  # it would wait 30 s for actors of Ray's own that live on it for ever
            environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *words]
            self._nodes[name] = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=REPOSITORY, start_new_session=True
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

    def ask(self, path: str) -> dict[str, Any]:
        """The dashboard's answer."""
        request = urllib.request.Request(
            f"{self.dashboard}/{path}", headers={"Authorization": f"Bearer {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def close(self) -> None:
        """End what was started, the worker first, and all that it started."""
        _end(list(self._nodes.values())[::-1])
        shutil.rmtree(self.folder, ignore_errors=True)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    # One after the other: a worker asks its head before it ends, and waits for one that is gone.
    for process in processes:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _agent(ports: list[int]) -> list[str]:
    return [f"--dashboard-agent-listen-port={ports[0]}", f"--dashboard-agent-grpc-port={ports[1]}"]
