"""The component kueue: jobs name their queue, and what is applied says nothing about whether they run."""

import pytest

from tests.k8s.rendered import OVERLAYS, documents, find, needs_kubectl

pytestmark = needs_kubectl


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_to_apply_again_suspends_no_job(overlay):
    """Kueue suspends a job that names a queue when it is made; a value here would be written back while it runs."""
    queues = {item["metadata"]["name"] for item in documents(overlay) if item["kind"] == "LocalQueue"}
    assert bool(queues) == (overlay == "gpu-shared")
    for instance in ("train", "tune"):
        job = find(documents(overlay), "RayJob", instance=instance)
        assert "suspend" not in job["spec"]
        assert {job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")} == (queues or {None})
