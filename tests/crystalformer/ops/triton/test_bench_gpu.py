"""tests/benchmarks/gpu.py: from end to end in the interpreter, and what it keeps when things go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from tests.benchmarks import gpu  # after the check for triton
from tests.benchmarks.gpu_kernels import clock_of, floors
from tests.benchmarks.gpu_process import Row, run_tasks, summary_of
from tests.benchmarks.gpu_report import Report
from tests.benchmarks.gpu_sections import judged, make_batch, run_tests
from tests.benchmarks.gpu_steps import TrainingStep, same_steps
from tests.crystalformer.ops.triton import cases

ROOT = Path(__file__).parents[4]
SMALL = ["--device", "cpu", "--batch", "2", "--atoms", "1", "--repeats", "1"]
INTERPRETER = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.gpu", *SMALL, *words]


def test_every_section_of_the_gpu_benchmark(tmp_path: Path) -> None:
    report = tmp_path / "gpu.json"
    words = command("--cases", "one-atom", "--json", str(report))
    run = subprocess.run(words, env=INTERPRETER, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    rows = json.loads(report.read_text())
    assert list(dict.fromkeys(row["section"] for row in rows)) == ["machine", *gpu.SECTIONS]
    assert {row["what"]: row["passed"] for row in rows if "passed" in row} == {
        "one-atom": True,
        "pytest -m gpu": True,
        "triton, torch.compile(eager), deterministic": True,
    }
    assert all(row["ms"] > 0 for row in rows if "ms" in row)
    steps = {row["what"] for row in rows if row["section"] == "G1"}
    for mode in ("deterministic", "torch's defaults"):
        names = ("torch", "triton", "triton, bfloat16", "list of a new batch")
        assert {f"{name}, {mode}" for name in names} <= steps
    table = run.stdout[run.stdout.index("### CPU") :]
    assert all(f"| {row['what']} |" in table for row in rows[1:])


def test_a_stopped_measurement_keeps_its_rows(tmp_path: Path) -> None:
    report = tmp_path / "gpu.json"
    words = command("--sections", "correctness", "G3", "--json", str(report))
    with subprocess.Popen(words, env=INTERPRETER, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if "what=one-atom" in line:
                break
        below = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGINT)
        rest = run.communicate(timeout=90)[0]
    rows = json.loads(report.read_text())
    assert [row["what"] for row in rows] == ["machine", "one-atom", "the rest"]
    assert rows[-1]["error"] == "interrupted"
    assert "| correctness | one-atom |" in rest
    assert run.returncode == 1
    assert below and not psutil.wait_procs(below, timeout=30)[1]


SERVING = """
import os, signal, subprocess, sys, time
from tests.benchmarks.gpu_process import Task, own_output, serve

def fail():
    raise AssertionError("no good")

def leave_a_child_with_the_pipe():
    if os.fork() == 0:
        time.sleep(120)
    os._exit(7)

tasks = [Task("first", lambda: {"ms": 1.0}), Task("second", lambda: %s), Task("third", lambda: {"ms": 3.0})]
sys.exit(serve(tasks, int(sys.argv[1]), own_output(), lambda: %s))
"""
"""A section whose second task goes wrong, and whether it calls itself sound then."""


def followed(source: str, limit: float) -> list[Row]:
    """The rows of a process that runs ``source``."""
    return list(run_tasks(lambda first, _: [sys.executable, "-X", "faulthandler", "-c", source, str(first)], limit))


@pytest.mark.parametrize(
    ("second", "sound", "error"),
    [
        ("fail()", True, "AssertionError: no good"),
        ("fail()", False, "AssertionError: no good"),
        ("{'ms': object()}", True, "TypeError: Object of type object is not JSON serializable"),
        ("os._exit(0)", True, "ended with status 0"),
        ("sys.exit(3)", True, "ended with status 3"),
        ("os._exit(7)", True, "ended with status 7"),
        ("leave_a_child_with_the_pipe()", True, "ended with status 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", True, "ended by Killed"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", True, "ended by Segmentation fault"),
    ],
)
def test_a_task_that_goes_wrong_costs_its_own_row(second: str, *, sound: bool, error: str) -> None:
    start = time.monotonic()
    first, failed, third = followed(SERVING % (second, sound), 120.0)
    assert (first, third) == ({"what": "first", "ms": 1.0}, {"what": "third", "ms": 3.0})
    assert (failed["what"], failed["passed"]) == ("second", False)
    assert failed["error"].startswith(error)
    assert time.monotonic() - start < 60.0


def test_a_task_that_hangs_costs_the_rest_and_says_where() -> None:
    start = time.monotonic()
    first, failed = followed(SERVING % ("time.sleep(120)", True), 5.0)
    assert first == {"what": "first", "ms": 1.0}
    assert (failed["what"], failed["passed"], failed["left_out"]) == ("second", False, ["third"])
    assert "were over" in failed["error"]
    assert "most recent call first" in failed["stderr"] and "in <lambda>" in failed["stderr"]
    assert time.monotonic() - start < 60.0


def test_a_process_that_goes_on_and_has_no_time_says_what_it_left_out() -> None:
    slow_start = "import sys, time; time.sleep(60 * int(sys.argv[1]))" + SERVING % ("os._exit(7)", True)
    _, failed, stopped = followed(slow_start, 2.0)
    assert (failed["what"], failed["error"]) == ("second", "ended with status 7")
    assert (stopped["what"], stopped["passed"], stopped["left_out"]) == ("start", False, ["third"])


def test_a_section_that_cannot_begin_gives_one_row() -> None:
    (row,) = followed("print('noise'); import sys; sys.exit('no such thing')", 30.0)
    assert row == {
        "what": "start",
        "passed": False,
        "error": "ended with status 1: no such thing",
        "stderr": "no such thing",
    }


def test_what_a_task_prints_is_no_row() -> None:
    rows = followed(SERVING % ("print('noise') or os.system('echo more') or {'ms': 2.0}", True), 30.0)
    assert [row["ms"] for row in rows] == [1.0, 2.0, 3.0]


def test_a_long_error_keeps_its_reason() -> None:
    text = summary_of(ValueError("\n".join(f"line {number}" for number in range(50))))
    assert text.startswith("ValueError: line 0\n") and text.endswith("\nline 49") and len(text.splitlines()) == 9
    assert summary_of(KeyError()) == "KeyError: "


def test_the_file_holds_every_row_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "rows.json")
    for count in range(1, 4):
        report.add({"section": "tiles", "what": f"a|b {count}", "passed": count < 3, "error": "one\ntwo"})
        assert len(json.loads((tmp_path / "rows.json").read_text())) == count
    assert report.table().splitlines()[-1] == "| tiles | a\\|b 3 | one |  |  | **failed** |"
    assert not report.passed
    assert capsys.readouterr().out.count("    two\n") == 3


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(tmp_path / "gone" / "rows.json")
    report.add({"section": "tiles", "what": "a", "passed": True})
    assert report.passed and "No such file" in capsys.readouterr().err


MARKED = "import time, pytest\npytestmark = getattr(pytest.mark, 'gpu')\n"
"""Not by attribute: ``pytest -m gpu`` reads every file that has those words (tests/conftest.py), which this one lacks
since it needs more than a lent machine has."""

TESTED = """
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.fixture
def broken(): raise OSError
def test_broken(broken): pass
@pytest.mark.skip
def test_skipped(): pass
def test_slow(): time.sleep(float(%s))
def test_last(): pass
"""


@pytest.mark.parametrize(("seconds", "last"), [(0, 3), (60, 1)], ids=["to the end", "stopped"])
def test_tests_are_counted(seconds: int, last: int, tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(MARKED + TESTED % seconds)
    row = run_tests([str(file)], torch.device("cuda"), 11.0)
    assert (row["succeeded"], row["failed"], row["skipped"], row["passed"]) == (last, 2, 1, False)
    assert "assert 1 == 2" in row["tail"] or seconds
    assert "test_slow" in row["tail"] or not seconds


def test_a_file_that_cannot_be_imported_does_not_keep_others_from_running(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("import no_such_module")
    (tmp_path / "test_b.py").write_text(MARKED + "def test_good(): pass\n")
    row = run_tests([str(tmp_path)], torch.device("cuda"), 60.0)
    assert (row["succeeded"], row["passed"]) == (1, False)
    assert "No module named 'no_such_module'" in row["tail"]


def test_on_a_gpu_tests_that_are_all_skipped_have_not_passed(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(MARKED + "@pytest.mark.skip\ndef test_it(): pass\n")
    assert [run_tests([str(file)], torch.device(name), 60.0)["passed"] for name in ("cuda", "cpu")] == [False, True]


@pytest.mark.parametrize("name", ["y", "q", "rho"])
def test_a_gradient_that_is_no_number_fails(name: str) -> None:
    case = cases.CASES[0]
    expected = cases.oracle(case)
    assert judged(case, expected, expected, expected)["passed"]
    found = {**expected, name: torch.full_like(expected[name], torch.nan)}
    row = judged(case, found, found, expected)
    assert (row["passed"], row["in"]) == (False, name)
    assert not judged(case, expected, {**expected, name: expected[name] + 1e-9}, expected)["passed"]


def test_a_step_more_is_another_step() -> None:
    batch = make_batch(2, 2, "grid")
    runs = [TrainingStep(batch, "torch") for _ in range(3)]
    start = runs[0].weights()
    ends = [([run() for _ in range(count)][-1], run.weights()) for run, count in zip(runs, (3, 3, 4), strict=True)]
    same = same_steps(start, ends[0], ends[1])
    assert same["passed"] and same["bitwise"] and same["relative_error"] == 0.0
    for end in (ends[2], (ends[0][0], ends[2][1]), (ends[2][0], ends[0][1]), (ends[0][0], start * torch.nan)):
        assert not same_steps(start, ends[0], end)["passed"]


def test_the_floor_is_the_slowest_need_by_the_quickest_way() -> None:
    work = {"bytes": 1e6, "flop": 6e6, "exponentials": 1e3}
    rates = {"bytes": 1e12, "flop": 1e12, "exponentials": 1e12}
    plain = floors(work, rates)
    assert (plain["floor_of"], plain["floor_us"]) == ("flop", pytest.approx(6.0))
    units = floors(work, {**rates, "tf32_flop": 6e12, "clock": "reported"})
    assert (units["floor_of"], units["floor_us"], units["flop_us"]) == (
        "tf32x3",
        pytest.approx(3.0),
        pytest.approx(6),
    )
    slow_units = floors(work, {**rates, "tf32_flop": 2e12})
    assert (slow_units["floor_of"], slow_units["tf32x3_us"]) == ("flop", pytest.approx(9.0))
    assert floors(work, {**rates, "tf32_flop": 1e15})["floor_of"] == "bytes"


def test_the_clock_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert clock_of(SimpleNamespace(clock_rate=1_980_000)) == ("reported", 1.98e9)
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = --id=GPU-7 ] && echo 1755\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clock_of(SimpleNamespace(uuid=7)) == ("nvidia-smi", 1.755e9)
    assert clock_of(SimpleNamespace(uuid=8)) == ("assumed 1.7 GHz (CalledProcessError)", 1.7e9)
    tool.unlink()
    assert clock_of(SimpleNamespace()) == ("assumed 1.7 GHz (FileNotFoundError)", 1.7e9)
