"""A Ray head of one's own, with dashboard and job server, on loopback: ``python -m cluster.head up|submit|down``.

``make dashboard``, ``make submit`` and ``make down`` call it. Whoever may submit a job may run anything as this user:
the head asks for Ray's token (``~/.ray/auth_token`` or RAY_AUTH_TOKEN) and listens on 127.0.0.1 only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from cluster.environment import LOOPBACK_ONLY
from cluster.errors import UserError
from cluster.files import write_text
from cluster.log import say
from cluster.paths import VARIABLE

LOOPBACK = "127.0.0.1"
DASHBOARD_PORT = 8265
START_SECONDS = 120.0
STOP_SECONDS = 10.0
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A head that was started; kept in ``head.json`` of its folder."""

    pid: int
    """Of ``ray start --block``, which leads a process group of its own."""
    started: float
    """When that process began, so that another one with the same pid is not taken for it."""
    dashboard: str
    address: str
    """For RAY_ADDRESS."""
    metrics: str
    """Prometheus endpoint of the node."""


def command_line() -> argparse.ArgumentParser:
    """The commands and their options."""
    parser = argparse.ArgumentParser(prog="python -m cluster.head", description="A local Ray head with a dashboard.")
    parser.add_argument("--folder", default=".ray-head", help="where its pid and log are kept (default .ray-head)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start the head, or tell where it is")
    up.add_argument("--port", type=int, default=DASHBOARD_PORT, help=f"of the dashboard (default {DASHBOARD_PORT})")
    submit = commands.add_parser("submit", help=f"run a command there, or at {ADDRESS_VARIABLE}")
    submit.add_argument("job", help='what crystalformer is to do: "train --target shear"')
    commands.add_parser("down", help="stop the head that up started")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands and give its exit status."""
    args = command_line().parse_args(argv)
    folder = Path(args.folder).resolve()
    try:
        if args.command == "submit":
            return submit_job(folder, args.job)
        if args.command == "up":
            say("\n".join(describe(start(folder, args.port))))
        else:
            say(stop(folder))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or folder}: {error.strerror or error}\n")
        return 2
    return 0


def describe(head: Head) -> list[str]:
    """What a user needs to know of it."""
    return [
        f"dashboard   {head.dashboard} (it asks for the token that `ray get-auth-token` prints)",
        f"metrics     {head.metrics}",
        'jobs        make submit JOB="train --target shear"',
        f"or          RAY_ADDRESS={head.address} make train",
        "stop        make down",
    ]


def start(folder: Path, port: int = DASHBOARD_PORT) -> Head:
    """The head of ``folder``, started if it is not running. UserError where it cannot be."""
    running = find(folder)
    if running is not None:
        return running
    if not 1 <= port <= 65535 or not _free(port):
        raise UserError(f"port {port} of {LOOPBACK} cannot be used for the dashboard; choose another: PORT=8266")
    folder.mkdir(parents=True, exist_ok=True)
    _ray("get-auth-token", "--generate")
    gcs, metrics, agent = _free_ports(3)
    words = ["start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=true", f"--port={gcs}"]
    words += [f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", f"--dashboard-port={port}"]
    # The agent runs the jobs; on a port that is taken it would do without its server and say nothing.
    words += [f"--metrics-export-port={metrics}", f"--dashboard-agent-listen-port={agent}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [_ray_command(), *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
    head = Head(
        pid=process.pid,
        started=psutil.Process(process.pid).create_time(),
        dashboard=f"http://{LOOPBACK}:{port}",
        address=f"{LOOPBACK}:{gcs}",
        metrics=f"http://{LOOPBACK}:{metrics}/metrics",
    )
    write_text(_file(folder), json.dumps(asdict(head), indent=1) + "\n")
    _wait_until_up(process, head, agent, folder)
    return head


def find(folder: Path) -> Head | None:
    """The head of ``folder`` if it is running."""
    try:
        head = Head(**json.loads(_file(folder).read_text(encoding="utf-8")))
        alive = abs(psutil.Process(head.pid).create_time() - head.started) < 1
    except (OSError, ValueError, TypeError, psutil.NoSuchProcess):
        return None
    return head if alive else None


def stop(folder: Path) -> str:
    """Stop the head of ``folder`` and all it has started; says what was done."""
    head = find(folder)
    _file(folder).unlink(missing_ok=True)
    if head is None:
        return f"no head of {folder} is running"
    everything: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):  # it ended in this moment
        leader = psutil.Process(head.pid)
        everything = [leader, *leader.children(recursive=True)]
        leader.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(everything, timeout=STOP_SECONDS)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=STOP_SECONDS)
    return f"stopped the head at {head.dashboard}"


def submit_job(folder: Path, job: str) -> int:
    """``ray job submit`` of this folder with a crystalformer command; shows its output, gives its exit status."""
    head = find(folder)
    address = os.environ.get(ADDRESS_VARIABLE) or (head.dashboard if head else None)
    if address is None:
        raise UserError(
            f"no Ray head to submit to: `make dashboard` starts one here, {ADDRESS_VARIABLE} names another"
        )
    try:
        command = ["crystalformer", *shlex.split(job)]
    except ValueError as error:
        raise UserError(f"JOB {job!r}: {error}") from error
    words = ["job", "submit", "--address", address, "--working-dir", ".", "--", *command]
    return subprocess.run([_ray_command(), *words], env=_environment(), check=False).returncode


def _wait_until_up(process: subprocess.Popen[bytes], head: Head, agent: int, folder: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    urls = (f"{head.dashboard}/api/jobs/", f"http://{LOOPBACK}:{agent}/api/healthz")
    while not all(_answers(url) for url in urls):
        if process.poll() is not None or time.monotonic() > deadline:
            stop(folder)
            raise UserError(f"the Ray head did not start; see {folder / 'log'}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    """Whether a server is up; without a token it answers that one is missing, which will do."""
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:  # our own http address
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)
    except OSError:
        return False


def _environment() -> dict[str, str]:
    """Ours, with this environment's commands first on PATH, for jobs too; their relative paths begin here."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {VARIABLE: os.getcwd(), **os.environ, **dict([LOOPBACK_ONLY]), "PATH": path}


def _ray_command() -> str:
    return str(Path(sys.executable).parent / "ray")


def _ray(*words: str) -> None:
    done = subprocess.run([_ray_command(), *words], capture_output=True, text=True, env=_environment(), check=False)
    if done.returncode != 0:
        raise UserError(f"ray {words[0]} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")


def _file(folder: Path) -> Path:
    return folder / "head.json"


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]


if __name__ == "__main__":
    sys.exit(main())
