"""Ray Data is quiet on the terminal, and at an end when its reader is."""

import logging
import threading
import time
from contextlib import closing

import pytest
import ray.data

from data_pipeline.steps.ray_address import join_or_start
from data_pipeline.steps.ray_data import blocks_of, quiet_ray_data


@pytest.fixture
def own_ray():
    assert not ray.is_initialized()
    join_or_start(num_cpus=2, log_to_driver=False, logging_level=logging.WARNING)
    yield
    ray.shutdown()


def test_who_stops_reading_leaves_no_thread_that_asks_ray_for_more(own_ray, monkeypatch):
    """It would start another Ray once this one is left, whatever the reader does with the error that stopped it."""
    before, get = set(threading.enumerate()), ray.get
    read, asking = [], threading.Event()

    def slow(*args, **options):
        if read and threading.current_thread().name == "iter_threaded":
            asking.set()
            time.sleep(1.0)
        return get(*args, **options)

    monkeypatch.setattr(ray, "get", slow)
    data = ray.data.range(200, override_num_blocks=40).map_batches(lambda rows: rows, batch_format="pyarrow")
    with pytest.raises(KeyboardInterrupt), closing(blocks_of(data)) as blocks:
        for block in blocks:
            read.append(len(block))
            assert asking.wait(120)
            raise KeyboardInterrupt
    assert len(read) == 1 and 0 < read[0] < 200
    idle = "Prefetcher"  # for blocks that are fetched in advance, of which there are none
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {idle}


@pytest.fixture
def ray_data_logger():
    logger = logging.getLogger("ray.data")
    before = [(handler, handler.level) for handler in logger.handlers]
    yield logger
    for handler in set(logger.handlers) - {handler for handler, _ in before}:
        logger.removeHandler(handler)
    for handler, level in before:
        handler.setLevel(level)


def test_the_terminal_alone_is_spared_ray_datas_notes(ray_data_logger, tmp_path):
    """A handler of the user's, or of the tests' own, goes on taking all it took."""
    own = [logging.StreamHandler(), logging.FileHandler(tmp_path / "log")]
    for handler in own:
        ray_data_logger.addHandler(handler)
    quiet_ray_data()
    levels = {handler.get_name(): handler.level for handler in ray_data_logger.handlers if handler not in own}
    assert levels["console"] == logging.ERROR and levels["file"] == logging.NOTSET
    assert [handler.level for handler in own] == [logging.NOTSET] * 2
    own[1].close()
