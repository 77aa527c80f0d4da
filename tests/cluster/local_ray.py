"""A Ray of this machine alone for the tests of a file."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

import cluster  # noqa: F401 - sets Ray's environment


@contextmanager
def local_ray(num_cpus: int) -> Iterator[None]:
    """Within, this process is the driver of a Ray with so many CPUs, which says nothing."""
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()
