"""The encoder as one node of autograd: the numbers of its modules, which all that looks into them still gets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from crystalformer import Crystalformer, ModelConfig, fused
from crystalformer.batch import PackedShells
from crystalformer.ops.numba import launch, pairs
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal, supercell
from tests.crystalformer.models import SMALL


def crystals():
    return batch_of(*golden_crystals(), random_crystal(9, seed=5), random_crystal(1, seed=2))


def new_model(**settings) -> Crystalformer:
    torch.manual_seed(3)
    return Crystalformer(ModelConfig(**{**SMALL, **settings}))


def outcome(model: Crystalformer, batch=None, *, by_modules: bool) -> dict[str, torch.Tensor]:
    """Output and gradients; a hook on a module inside asks for the modules."""
    hook = model.blocks[0].linear1.register_forward_hook(lambda *_: None) if by_modules else None
    output = model(crystals() if batch is None else batch)
    leaves = dict(model.named_parameters())
    found = torch.autograd.grad(output.square().sum(), list(leaves.values()))
    if hook is not None:
        hook.remove()
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


def assert_alike(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each to within rounding, of its own largest number or, where sums cancel to 0, of a twentieth of all."""
    least = 0.05 * max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) < 2e-5 * max(least, float(value.abs().max())), name


@pytest.fixture
def counted(monkeypatch):
    """Calls of the fused encoder."""
    calls, encode = [], fused.encode

    def noted(*operands):
        calls.append(operands)
        return encode(*operands)

    monkeypatch.setattr(fused, "encode", noted)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_pe_dist_real": 0},
        {"value_pe_headed": False, "scale_real": (1.2, 1.6)},
        {"pooling": "max"},
        {"pre_pooling_op": "w+bn+relu", "norm_type": "bn", "embedding_dim": (16, 8)},
        {"positive_func": "softplus=2"},
        {"model_dim": 80, "head_num": 10, "ff_dim": 528},
        {"num_layers": 1, "head_num": 1},
    ],
)
def test_outputs_and_gradients_are_those_of_the_modules(settings, counted):
    model = new_model(**settings)
    model.freeze_statistics(crystals())
    assert len(counted) == model.config.num_layers
    counted.clear()
    expected = outcome(model, by_modules=True)
    assert not counted
    found = outcome(model, by_modules=False)
    assert len(counted) == 1
    if model.config.norm_type == "bn":  # biases before it have no gradient but rounding's
        for name in ("pre_pooling.0.bias", "head.0.bias"):
            assert expected.pop(name).abs().max() < 1e-4 * expected[name.replace("bias", "weight")].abs().max()
    assert_alike(found, expected)


def test_a_large_cell_whose_plan_reorders_its_atoms_is_the_same(counted, monkeypatch):
    model, order = new_model(), np.random.default_rng(0).permutation(16 * 40)
    large = supercell(random_crystal(40, seed=4), 4, 2, 2)
    large = replace(large, positions=large.positions[order], numbers=large.numbers[order])
    batch = batch_of(large).unmerged(model.config.neighbor_radius)
    model.freeze_statistics(batch)
    counted.clear()
    expected = outcome(model, batch, by_modules=True)
    plan = pairs.PairPlan.of(batch.shells(model.config.neighbor_radius))
    assert plan.placed is not plan.arrays
    assert_alike(outcome(model, batch, by_modules=False), expected)
    assert len(counted) == 1
    monkeypatch.setattr(launch, "FEATURE_LIMIT", 0)  # radial features atom by atom
    again = batch_of(large).unmerged(model.config.neighbor_radius)
    assert_alike(outcome(model, again, by_modules=False), expected)


def test_results_do_not_depend_on_the_threads():
    model, before = new_model(), torch.get_num_threads()
    large = [random_crystal(n, seed=n) for n in (70, 1, 33, 2)]
    model.freeze_statistics(batch_of(*large))
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(outcome(model, batch_of(*large), by_modules=False))
    finally:
        torch.set_num_threads(before)
    inside = [name for name in found[0] if name.startswith("blocks.")]  # the head's products are PyTorch's
    assert len(inside) == 28
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in inside)


def test_a_narrow_layer_beside_a_list_of_its_own_radius_is_the_same():
    model = new_model(scale_real=(1.0, 1.6))
    plain, listed = crystals(), crystals()
    listed.distinct(model.config.neighbor_radius)
    seen = listed.distinct(model.config.neighbor_radius)
    narrow = model.config.neighbor_radius / 1.6
    whole = seen.shells(model.config.neighbor_radius)
    near = whole.distance <= narrow
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), near.long().cumsum(0)])[whole.ptr]
    kept = {name: getattr(whole, name)[near] for name in ("neighbor", "distance", "count")}
    seen.attach_shells(PackedShells(radius=narrow, ptr=ends, **kept))
    assert_alike(outcome(model, listed, by_modules=False), outcome(model, plain, by_modules=False))


def test_weights_in_another_order_of_memory_are_read_as_they_are():
    model = new_model()
    model.freeze_statistics(crystals())
    expected = outcome(model, by_modules=False)
    weight = model.blocks[1].attention.k_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous()
    assert_alike(outcome(model, by_modules=False), expected)


def test_a_weight_of_another_dtype_is_refused():
    model = new_model().eval()
    model.blocks[1].linear1.double()
    with pytest.raises(RuntimeError, match=r"weights must be contiguous and of float32, got torch\.float64"):
        model(crystals())


def test_a_model_without_statistics_yet_is_the_same(counted):
    model = new_model().eval()
    assert_alike(outcome(model, by_modules=False), outcome(model, by_modules=True))
    assert len(counted) == 1


def test_without_gradients_the_output_is_the_same():
    model = new_model().eval()
    with torch.no_grad():
        plain = model(crystals())
    assert torch.equal(plain, model(crystals()).detach())


def test_weights_that_are_held_leave_the_other_gradients_as_they_are():
    model = new_model()
    model.freeze_statistics(crystals())
    expected = outcome(model, by_modules=False)
    for parameter in model.blocks[0].parameters():
        parameter.requires_grad_(False)
    model(crystals()).square().sum().backward()
    assert model.blocks[0].linear1.weight.grad is None
    assert torch.equal(model.blocks[1].linear1.weight.grad, expected["blocks.1.linear1.weight"])
    assert torch.equal(model.embedding.grad, expected["embedding"])


def test_a_graph_that_is_retained_gives_the_gradient_again_and_one_that_is_not_refuses():
    model = new_model()
    model.freeze_statistics(crystals())
    loss = model(crystals()).square().sum()
    weight = model.blocks[0].attention.v_proj.weight
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(loss, weight)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, weight)


def test_weights_changed_before_the_backward_are_noticed():
    model = new_model()
    loss = model(crystals()).sum()
    with torch.no_grad():
        model.blocks[1].linear2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(crystals())


def partitioned(model):
    model.blocks[0].attention.gauss_direction.ds_id = 0
    model(crystals())


def watched(model):
    hook = model.blocks[1].attention.q_proj.register_full_backward_hook(lambda *_: None)
    model(crystals()).sum().backward()
    hook.remove()


def watched_everywhere(model):
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    model(crystals())
    hook.remove()
    assert seen.count(torch.nn.Linear) == 6 * 2 + 2


class Doubling(torch.nn.Linear):
    """A layer of a user's own."""

    def forward(self, x):
        return 2 * super().forward(x)


def replaced(model):
    own = model.blocks[0].linear2
    model.blocks[0].linear2 = Doubling(own.in_features, own.out_features)
    model.blocks[0].linear2.load_state_dict(own.state_dict())
    found = outcome(model, by_modules=False)["output"]
    with torch.no_grad():
        own.weight.mul_(2), own.bias.mul_(2)
    model.blocks[0].linear2 = own
    torch.testing.assert_close(outcome(model, by_modules=True)["output"], found)


def patched(model):
    model.blocks[0].linear2.forward = lambda x: torch.zeros(len(x), SMALL["model_dim"])
    model(crystals())


def test_statistics_are_those_of_the_modules(counted):
    model, by_modules = new_model(), new_model()
    model.freeze_statistics(crystals())
    assert len(counted) == 2
    by_modules.blocks[0].register_forward_hook(lambda *_: None)
    by_modules.blocks[1].register_forward_hook(lambda *_: None)
    by_modules.freeze_statistics(crystals())
    assert len(counted) == 2
    for block, other in zip(model.blocks, by_modules.blocks, strict=True):
        torch.testing.assert_close(block.attention.statistics, other.attention.statistics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [autocast, partitioned, watched, watched_everywhere, replaced, patched, lambda model: model.double()(crystals())],
)
def test_what_needs_the_modules_gets_them(how, counted):
    how(new_model().eval())
    assert not counted


@pytest.mark.parametrize(
    ("settings", "backend"),
    [({"domain": "multihead"}, "auto"), ({}, "torch"), ({"model_dim": 36}, "auto"), ({"ff_dim": 40}, "auto")],
)
def test_other_domains_backends_and_sizes_have_their_modules(settings, backend, counted):
    Crystalformer(ModelConfig(**{**SMALL, **settings}), backend=backend)(crystals())
    assert not counted
