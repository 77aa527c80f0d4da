"""What a run shows: plain lines in a file, a bar on a terminal."""

import io

import pytest

from cluster.run.progress import STEP_LINE_SECONDS, Progress, counting

UNITS = {"shear": "log10(GPa)", "n": "1"}
ROW = {"train_loss": 0.12341, "val_mae": {"shear": 0.10119}, "structures_per_s": 812.4}


class Clock:
    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_plain_line_an_epoch():
    clock, stream = Clock(), io.StringIO()
    with Progress(100, UNITS, stream=stream, clock=clock) as progress:
        progress.note("training on [cpu]")
        clock.seconds += 12
        progress.update({"epoch": 12, **ROW})
    assert stream.getvalue().splitlines() == [
        "training on [cpu]",
        "epoch 12/100  loss 0.1234  val_mae shear 0.1012 log10(GPa)  812 structures/s  0:01:28 left",
    ]


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_unit_is_shown_and_not_obeyed(kind, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    stream = kind()
    with Progress(100, {"shear": "\x07eV\x1b]0;"}, stream=stream) as progress:
        progress.note("warning: a\x07b\nc")
        progress.update({"epoch": 12, **ROW})
    assert "val_mae shear 0.1012 \\x07eV\\x1b]0;" in stream.getvalue() and "\x07" not in stream.getvalue()
    assert "a\\x07b\nc\n" in stream.getvalue().replace("\r", "")


def test_time_left_goes_by_the_training_time_where_rows_tell_it():
    clock, stream = Clock(), io.StringIO()
    with Progress(10, UNITS, stream=stream, clock=clock) as progress:
        clock.seconds += 500  # workers start
        progress.update({"epoch": 2, "seconds": 6.0})
    assert stream.getvalue() == "epoch 2/10  0:00:24 left\n"


def test_time_left_of_a_resumed_run_counts_its_own_epochs():
    clock, stream = Clock(), io.StringIO()
    with Progress(20, UNITS, done_epochs=10, stream=stream, clock=clock) as progress:
        clock.seconds += 10
        progress.update({"epoch": 12})
        clock.seconds += 40
        progress.update({"epoch": 20})
    assert stream.getvalue().splitlines() == ["epoch 12/20  0:00:40 left", "epoch 20/20  0:00:00 left"]


def test_missing_numbers_are_passed_over_and_pure_numbers_have_no_unit():
    stream = io.StringIO()
    with Progress(2, UNITS, stream=stream, clock=Clock()) as progress:
        progress.update({"epoch": 1, "train_loss": None, "val_mae": {"shear": None, "n": 0.5}})
        progress.update({"epoch": 2, "val_mae": None})
    assert stream.getvalue() == "epoch 1/2  val_mae n 0.5000  0:00:00 left\nepoch 2/2  0:00:00 left\n"


def test_long_epochs_speak_now_and_then():
    clock, stream = Clock(), io.StringIO()
    with Progress(5, UNITS, stream=stream, clock=clock) as progress:
        progress.step(1, 10, 100)
        assert stream.getvalue() == ""
        clock.seconds += STEP_LINE_SECONDS
        progress.step(1, 20, 100)
        progress.step(1, 21, 100)
    assert stream.getvalue() == "epoch 1/5  step 20/100\n"


def test_a_bar_on_a_terminal(monkeypatch):
    for width, shown in (
        ("80", "val shear 0.1012  812/s"),
        ("150", "val_mae shear 0.1012 log10(GPa)  812 structures/s"),
    ):
        monkeypatch.setenv("COLUMNS", width)
        monkeypatch.setenv("TERM", "xterm")
        stream = Terminal()
        with Progress(100, UNITS, stream=stream, clock=Clock()) as progress:
            progress.note("note [x]")
            progress.step(12, 1, 2)
            progress.update({"epoch": 12, **ROW})
        assert "note [x]" in stream.getvalue()
        assert "epoch 12/100" in stream.getvalue()
        assert f"loss 0.1234  {shown}  0:00:00 left" in stream.getvalue()


def test_counting_in_lines():
    clock, stream = Clock(), io.StringIO()
    with counting(stream, clock) as show:
        show("reading", 1, 300)
        show("reading", 2, 300)
        show("writing", 1, 9)
        clock.seconds += STEP_LINE_SECONDS
        show("reading", 300, 300)
    assert stream.getvalue() == "reading 1/300\nwriting 1/9\nreading 300/300\n"


def test_counting_with_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with counting(stream) as show:
        show("reading", 7, 300)
    assert "reading" in stream.getvalue()
    assert "7/300" in stream.getvalue()
