"""The encoder as one node of autograd: the numbers of its modules, which all that looks into them still gets."""

import pytest
import torch

from crystalformer import Crystalformer, ModelConfig, fused
from crystalformer.config import PositiveFunction
from crystalformer.positive import positive, positive_slope
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal
from tests.crystalformer.models import SMALL

FUNCTIONS = ["elu=0.1", "elu", "abs", "exp=0.5", "softplus", "softplus=2", "sigmoid=0.7"]


def crystals():
    return batch_of(*golden_crystals(), random_crystal(9, seed=5), random_crystal(1, seed=2))


def new_model(**settings) -> Crystalformer:
    torch.manual_seed(3)
    return Crystalformer(ModelConfig(**{**SMALL, **settings}))


def outcome(model: Crystalformer, *, by_modules: bool) -> dict[str, torch.Tensor]:
    """Output and gradients; a hook on a module inside asks for the modules."""
    hook = model.blocks[0].linear1.register_forward_hook(lambda *_: None) if by_modules else None
    output = model(crystals())
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


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_slope_is_the_derivative(function):
    x = torch.linspace(-4, 4, 401, dtype=torch.float64, requires_grad=True)
    parsed = PositiveFunction.parse(function)
    rho = positive(x, parsed, 0.3)
    expected = torch.autograd.grad(rho.sum(), x)[0]
    torch.testing.assert_close(positive_slope(rho, x, parsed, 0.3), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"value_pe_dist_real": 0},
        {"value_pe_headed": False, "scale_real": (1.2, 1.6)},
        {"pooling": "max"},
        {"pre_pooling_op": "w+bn+relu", "norm_type": "bn", "embedding_dim": (16, 8)},
        *({"positive_func": function} for function in FUNCTIONS[1:]),
    ],
)
def test_outputs_and_gradients_are_those_of_the_modules(settings, counted):
    model = new_model(**settings)
    model.freeze_statistics(crystals())
    expected = outcome(model, by_modules=True)
    assert not counted
    found = outcome(model, by_modules=False)
    assert len(counted) == 1
    assert_alike(found, expected)


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


@pytest.mark.parametrize("how", [autocast, partitioned, watched, lambda model: model.double()(crystals())])
def test_what_needs_the_modules_gets_them(how, counted):
    how(new_model().eval())
    assert not counted


@pytest.mark.parametrize(("settings", "backend"), [({"domain": "multihead"}, "auto"), ({}, "torch")])
def test_other_domains_and_backends_have_their_modules(settings, backend, counted):
    Crystalformer(ModelConfig(**{**SMALL, **settings}), backend=backend)(crystals())
    assert not counted
