"""Frozen statistics: every layer's shift and scale, taken from the first training batch and kept."""

import threading
from copy import deepcopy

import pytest
import torch

from crystalformer import CrystalBatch, Crystalformer, ModelConfig
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal
from tests.crystalformer.models import SMALL


def attention_inputs(model: Crystalformer, batch: CrystalBatch) -> list[torch.Tensor]:
    """What each layer's attention sees of ``batch``."""
    seen = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
        for block in model.blocks
    ]
    with torch.no_grad():
        model.eval()(batch)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("domain", ["real", "multihead", "reci-real"])
def test_first_training_batch_makes_every_layers_arguments_standard(domain):
    """s (a + t) has mean 0 and standard deviation 1 (unbiased) over the batch's atoms and all heads."""
    model = Crystalformer(ModelConfig(**SMALL, domain=domain)).double().train()
    for block in model.blocks:  # biases matter, too
        torch.nn.init.normal_(block.attention.q_proj.bias)
    batch = batch_of(*golden_crystals())
    model(batch)
    for block, x in zip(model.blocks, attention_inputs(model, batch), strict=True):
        attention = block.attention
        if domain == "real":  # each for all that are like it
            x = x.repeat_interleave(batch.distinct(model.config.neighbor_radius).multiplicity, 0)
        q = (x @ attention.q_proj.weight.T + attention.q_proj.bias).view(22, 4, 8)
        scale, shift = attention.statistics
        argument = (scale * (torch.einsum("nhd,hd->nh", q, attention.gauss_direction) + shift)).detach()
        assert float(argument.mean()) == pytest.approx(0, abs=1e-12)
        assert float(argument.std(unbiased=True)) == pytest.approx(1, rel=1e-12)


def statistics(model: Crystalformer) -> torch.Tensor:
    return torch.stack([block.attention.statistics for block in model.blocks])


def test_statistics_are_taken_once_and_only_in_training():
    model = Crystalformer(ModelConfig(**SMALL)).eval()
    model(batch_of(*golden_crystals()))
    assert not statistics(model).any()
    model.train()(batch_of(*golden_crystals()))
    first = statistics(model).clone()
    assert (first[:, 0] > 0).all()
    model(batch_of(random_crystal(9, seed=0)))
    assert torch.equal(statistics(model), first)


def test_loaded_statistics_stay():
    trained = Crystalformer(ModelConfig(**SMALL)).train()
    trained(batch_of(*golden_crystals()))
    loaded = Crystalformer(ModelConfig(**SMALL)).train()
    loaded.load_state_dict(trained.state_dict())
    loaded(batch_of(random_crystal(9, seed=0)))
    assert torch.equal(statistics(loaded), statistics(trained))


def test_loading_says_anew_whether_the_statistics_are_frozen():
    fresh, model = (Crystalformer(ModelConfig(**SMALL)).train() for _ in range(2))
    model(batch_of(*golden_crystals()))
    assert model.frozen
    copy = deepcopy(model)
    model.load_state_dict(fresh.state_dict())
    assert not model.frozen and copy.frozen
    model(batch_of(*golden_crystals()))
    assert model.frozen


def test_a_frozen_model_is_not_asked_again():
    """The answer lies on the device: reading it would hold up every step of a GPU."""
    model = Crystalformer(ModelConfig(**SMALL)).train()
    model(batch_of(*golden_crystals()))
    assert model.frozen
    with torch.profiler.profile() as profile:
        assert model.frozen
    assert not [event for event in profile.events() if event.name.startswith("aten::")]


def test_workers_freeze_the_statistics_of_the_global_batch():
    """Three workers with a part each, summing in turn, hold the numbers of one worker with the whole, bit for bit
    alike. 1e-11: sums in another order, and images that end at 8 sigma in other blocks."""
    torch.manual_seed(0)
    model = Crystalformer(ModelConfig(**SMALL, cutoff_sigmas=8.0)).double()
    parts = [golden_crystals()[:1], golden_crystals()[1:4], golden_crystals()[4:]]
    workers = [deepcopy(model) for _ in parts]
    barrier = threading.Barrier(len(parts), timeout=60)
    sent: dict[int, torch.Tensor] = {}

    def work(rank: int) -> None:
        def all_reduce(mine: torch.Tensor) -> torch.Tensor:
            sent[rank] = mine
            barrier.wait()
            total = sent[0] + sent[1] + sent[2]
            barrier.wait()
            return total

        workers[rank].freeze_statistics(batch_of(*parts[rank]), all_reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = deepcopy(model)
    alone.freeze_statistics(batch_of(*golden_crystals()))
    assert torch.equal(statistics(workers[0]), statistics(workers[1]))
    assert torch.equal(statistics(workers[0]), statistics(workers[2]))
    torch.testing.assert_close(statistics(workers[0]), statistics(alone), rtol=1e-11, atol=0)
    model.freeze_statistics(batch_of(*parts[1]))  # a part's own numbers are others
    assert float((statistics(model) / statistics(alone) - 1).abs().min()) > 1e-4
