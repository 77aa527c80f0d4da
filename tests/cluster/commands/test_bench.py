"""crystalformer bench: finds the checkout's benchmarks and hands their words on."""

import json

import pytest

from cluster.cli import main
from cluster.commands import bench
from tests.cluster.test_cli import failure


def test_benchmarks_are_those_there_are():
    assert {"attention", "data", "predict", "step"} <= set(bench.benchmarks())
    assert bench.benchmarks()["data"] == "tests.benchmarks.bench_data"


def test_outside_a_checkout_it_says_so(tmp_path, monkeypatch, capsys):
    assert bench.benchmarks(tmp_path) == {}
    monkeypatch.setattr(bench, "benchmarks", dict)
    assert "the benchmarks are in a checkout's tests/benchmarks" in failure(capsys, "bench", "data")


def test_unknown_ones_are_named(capsys):
    assert "unknown benchmark 'nope'; there are attention, data" in failure(capsys, "bench", "nope")
    assert "no benchmark given; there are attention, data" in failure(capsys, "bench")


def test_the_benchmarks_own_help(capsys):
    assert main(["bench", "data", "--help"]) == 0
    assert "--synthetic N" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("step --crystals 4,a", "--crystals: must be a whole number of at least 1, got 'a'"),
        ("step --threads none", "--threads: must be a whole number of at least 1, got 'none'"),
        ("step --rows C1,C9", "--rows: must be among C1, C2, C3, got 'C9'"),
        ("attention --device tpu", "--device: must be cpu or cuda, got 'tpu'"),
        ("tune --trials 0", "--trials: must be a whole number of at least 1, got '0'"),
        ("predict --json nowhere/a.json", "--json: must be a file in a folder that there is, got 'nowhere/a.json'"),
        ("scaling --repeat 2", "unrecognized arguments: --repeat 2"),
    ],
)
def test_wrong_options_of_a_benchmark_are_told_before_it_runs(words, message, capsys):
    assert message in failure(capsys, "bench", *words.split())


@pytest.mark.slow
def test_bench_data_measures_preparing_balance_and_a_made_up_table(tmp_path, capsys):
    file = tmp_path / "figures.json"
    words = ["--rows", "D1,S3", "--sample", "20", "--synthetic", "300", "--cif_rows", "60", "--json", str(file)]
    assert main(["bench", "data", *words]) == 0
    result = json.loads(file.read_text())
    assert "geometric mean (target 8)" in capsys.readouterr().out
    rows = {(row["row"], row["what"]): row for row in result["rows"]}
    balance = next(row for key, row in rows.items() if key[0] == "S3")
    assert 1 <= balance["mean"] <= 1.05 < balance["round_robin_mean"]
    assert rows["synthetic", "prepare by auto"]["rows"] == 300
    for executor in ("process", "ray"):
        assert rows["D1", f"prepare a CSV of CIF texts by {executor}"]["cpu_s"] > 0
    assert rows["synthetic", "iterate, limit 256 MB"]["rows"] == 240
