"""Joining the workers' process group; that it works over real workers is what every training test shows."""

import psutil
import pytest
import torch

from cluster.worker import process_group as module
from cluster.worker.process_group import process_group


@pytest.mark.parametrize(("backend", "named"), [("nccl", [torch.device("cuda", 3)]), ("gloo", [])])
def test_a_worker_names_its_own_gpu_before_it_joins(monkeypatch, backend, named):
    """Else "cuda" were the same GPU for all workers of a node, in what they sum up before DeepSpeed names theirs."""
    found = []
    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    with pytest.raises(RuntimeError, match="outside of a Ray Train training function"), process_group(backend):
        pytest.fail("there are no workers here to join")
    assert found == named


def test_the_first_worker_listens_at_its_nodes_address_alone(monkeypatch):
    told = []
    monkeypatch.setattr(module, "broadcast_from_rank_zero", told.append)
    store = module._store("127.0.0.1", 0, 1)
    listening = {c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert (
        [(place.ip, place.port) for place in listening if place.port == told[0][1]]
        == told
        == [("127.0.0.1", store.port)]
    )
