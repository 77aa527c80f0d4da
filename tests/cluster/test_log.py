"""Who may speak, and as whom."""

import logging

import pytest

from cluster.log import PACKAGES, say, setup_logging, tell_warnings


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    saved = [(logger, list(logger.handlers), logger.level) for logger in map(logging.getLogger, PACKAGES)]
    yield
    for logger, handlers, level in saved:
        logger.handlers = handlers
        logger.setLevel(level)


def test_rank_zero_speaks_once_and_other_libraries_are_left_alone(capsys):
    root = list(logging.getLogger().handlers)
    setup_logging(rank=3)
    setup_logging(rank=0)
    logging.getLogger("cluster.worker.engine").info("step %s", 5)
    logging.getLogger("cluster.worker.engine").debug("quiet")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("INFO rank 0 cluster.worker.engine: step 5")
    assert logging.getLogger().handlers == root


def test_other_ranks_speak_from_warnings_on(capsys):
    setup_logging(rank=2)
    logging.getLogger("data_pipeline.x").info("quiet")
    logging.getLogger("data_pipeline.x").warning("odd")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["WARNING rank 2 data_pipeline.x: odd"]


def test_a_command_speaks_plainly(capsys):
    setup_logging(level=logging.WARNING)
    logging.getLogger("cluster.data.tables").info("quiet")
    logging.getLogger("cluster.data.tables").warning("%s is read-only", "data")
    assert capsys.readouterr().err == "warning: data is read-only\n"


def test_warnings_are_told_until_nobody_asks_any_more(capsys):
    told = []
    setup_logging(rank=0)
    tell_warnings(told.append)
    tell_warnings(told.append)  # another trial in this process
    logger = logging.getLogger("crystalformer.ops.attention")
    logger.info("attention on cpu: numba")
    logger.warning("attention on cuda:0: torch (%s)", "no compiler")
    tell_warnings(None)
    logger.warning("unheard")
    assert told == ["warning: attention on cuda:0: torch (no compiler)"]
    assert "INFO rank 0 crystalformer.ops.attention: attention on cpu: numba" in capsys.readouterr().err


def test_say_writes_a_line_to_stdout(capsys):
    say("hello")
    assert capsys.readouterr().out == "hello\n"


def test_what_could_be_obeyed_by_a_terminal_is_an_escape(capsys):
    say("a\x1b[2J \udcff\nb")
    setup_logging(level=logging.WARNING)
    logging.getLogger("cluster.x").warning("%s is read-only\nfor us", "data\x9b2J")
    captured = capsys.readouterr()
    assert captured.out == "a\\x1b[2J \\udcff\nb\n"
    assert captured.err == "warning: data\\x9b2J is read-only\nfor us\n"
