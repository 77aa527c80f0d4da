"""Who may speak, and as whom."""

import logging

import pytest

from cluster.log import PACKAGES, say, setup_logging


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    saved = [(logging.getLogger(n), *_state(logging.getLogger(n))) for n in PACKAGES]
    yield
    for logger, handlers, level, propagate in saved:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def _state(logger):
    return list(logger.handlers), logger.level, logger.propagate


def test_rank_zero_speaks_once_and_other_libraries_are_left_alone(capsys):
    root = list(logging.getLogger().handlers)
    setup_logging(rank=3)
    setup_logging(rank=0)
    logging.getLogger("cluster.engine").info("step %s", 5)
    logging.getLogger("cluster.engine").debug("quiet")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("INFO rank 0 cluster.engine: step 5")
    assert logging.getLogger().handlers == root


def test_other_ranks_speak_from_warnings_on(capsys):
    setup_logging(rank=2)
    logging.getLogger("data_pipeline.x").info("quiet")
    logging.getLogger("data_pipeline.x").warning("odd")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["WARNING rank 2 data_pipeline.x: odd"]


def test_say_writes_a_line_to_stdout(capsys):
    say("hello")
    assert capsys.readouterr().out == "hello\n"
