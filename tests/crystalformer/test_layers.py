"""The attention module and the encoder block: rho, initialization (model.md, section 3), the frozen statistics."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch.nn import functional

from crystalformer import ModelConfig
from crystalformer.config import PositiveFunction
from crystalformer.layers import EncoderBlock, PeriodicAttention
from crystalformer.ops import RadialBasis
from crystalformer.ops.reference import attend_real
from crystalformer.positive import positive
from tests.crystalformer.crystals import batch_of, golden_crystals

SMALL = {"model_dim": 32, "head_num": 4, "ff_dim": 48, "num_layers": 3, "value_pe_dist_real": 16}


def rho(name: str, x: float, beta: float, b: float) -> float:
    """model.md, section 1, term by term."""
    if name == "elu":
        u = x * beta / (1 - b)
        return (1 - b) * (u if u > 0 else math.exp(u) - 1) + 1
    if name == "abs":
        return (1 - b) * abs(x) + b
    if name == "exp":
        return (1 - b) * math.exp(x * beta / (1 - b)) + b
    if name == "softplus":
        shifted = x + math.log(math.exp(beta * (1 - b)) - 1) / beta
        return math.log(1 + math.exp(beta * shifted)) / beta + b
    u = x * beta * (1 + b) / (1 - b) + math.log(b)
    return (1 / b - b) / (1 + math.exp(-u)) + b


NAMES = ["elu", "abs", "exp", "softplus", "sigmoid"]


@pytest.mark.parametrize("lower", [0.3, 0.5])
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_rho_is_the_papers_function(name, beta, lower):
    x = torch.linspace(-4, 4, 41, dtype=torch.float64)
    found = positive(x, PositiveFunction(name=name, beta=beta), lower)
    expected = [rho(name, value, beta, lower) for value in x.tolist()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    assert float(found.min()) >= lower


@pytest.mark.parametrize("name", NAMES)
def test_rho_is_1_where_its_argument_is_0(name):
    at_zero = positive(torch.zeros(1, dtype=torch.float64), PositiveFunction(name=name, beta=0.7), 0.4)
    assert float(at_zero) == pytest.approx(0.4 if name == "abs" else 1.0, rel=1e-12)


@pytest.mark.parametrize("beta", [700.0, 3000.0])
def test_softplus_has_no_steepest(beta):
    x = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    found = positive(x, PositiveFunction(name="softplus", beta=beta), 0.4)
    np.testing.assert_allclose(found.numpy(), [0.4, 1.0, 2.0], rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_rho_never_falls_below_its_bound_in_float32(name):
    x = torch.tensor([-1e4, -50.0, 50.0])
    assert float(positive(x, PositiveFunction(name=name, beta=0.1), 0.5).min()) >= 0.5


def attentions(config: ModelConfig) -> list[PeriodicAttention]:
    return [PeriodicAttention(config, layer) for layer in range(config.num_layers)]


def assert_xavier_uniform(weights: torch.Tensor, fans: tuple[int, int], gain: float):
    """Uniform in +-gain sqrt(6 / (fan_in + fan_out)); 1.5 %: five standard errors of a spread over 32,768 numbers."""
    weights = weights.detach()
    bound = gain * math.sqrt(6 / sum(fans))
    assert 0.99 * bound < float(weights.abs().max()) <= bound * (1 + 1e-6)
    assert float(weights.std()) == pytest.approx(bound / math.sqrt(3), rel=0.015)
    assert abs(float(weights.mean())) < 0.03 * bound


@pytest.mark.parametrize("num_layers", [4, 7])
def test_projections_begin_by_t_fixup(num_layers):
    config = ModelConfig(num_layers=num_layers)
    layers = attentions(config)
    scaled = 0.67 * num_layers**-0.25
    for name, gain in {"q_proj": 1, "k_proj": 1, "v_proj": scaled, "out_proj": scaled}.items():
        assert_xavier_uniform(torch.stack([getattr(layer, name).weight for layer in layers]), (128, 128), gain)
        assert all(not getattr(layer, name).bias.any() for layer in layers)


@pytest.mark.parametrize("num_layers", [4, 7])
def test_feed_forward_begins_by_t_fixup(num_layers):
    block = EncoderBlock(ModelConfig(num_layers=num_layers), 0)
    for linear in (block.linear1, block.linear2):
        assert_xavier_uniform(linear.weight, (128, 512), 0.67 * num_layers**-0.25)
        assert not linear.bias.any()


@pytest.mark.parametrize(
    ("domain", "headed", "heads", "rows"),
    [("real", True, 8, 128), ("real", False, 1, 16), ("multihead", True, 4, 128), ("multihead", False, 1, 16)],
)
def test_radial_projection_begins_uniform_over_all_heads(domain, headed, heads, rows):
    """Those of reciprocal space count too: in the authors' matrix they have rows that nothing uses."""
    config = ModelConfig(domain=domain, value_pe_dist_real=64, value_pe_headed=headed, num_layers=32)
    weights = torch.stack([layer.radial_weight for layer in attentions(config)])
    assert weights.shape == (32, heads, 16, 64)
    assert_xavier_uniform(weights, (rows, 64), 64**-0.5)


def test_gauss_direction_begins_normal():
    config = ModelConfig(num_layers=64)
    omega = torch.stack([layer.gauss_direction.detach() for layer in attentions(config)])
    assert omega.shape == (64, 8, 16)
    assert float(omega.std()) == pytest.approx(16**-0.5, rel=0.04)  # five standard errors over 8,192 numbers
    assert float(omega.abs().max()) > 3 * 16**-0.5  # normal, not uniform


def test_no_radial_functions_no_projection():
    attention = PeriodicAttention(ModelConfig(**{**SMALL, "value_pe_dist_real": 0}), 0)
    assert attention.radial is None
    assert attention.radial_weight is None


def test_radial_basis_is_that_of_the_layers_scale():
    config = ModelConfig(**SMALL, scale_real=(1.0, 1.5), value_pe_width_scale=2.0)
    radial = PeriodicAttention(config, 1).radial
    assert (radial.count, radial.r_max) == (16, 15.0)
    assert radial.width == pytest.approx(2.0 * 15.0 / 16)


def arguments(attention: PeriodicAttention, x: torch.Tensor) -> torch.Tensor:
    """(N, H) a = omega q, spelt out."""
    q = (x @ attention.q_proj.weight.T + attention.q_proj.bias).unflatten(-1, attention.gauss_direction.shape)
    return torch.einsum("nhd,hd->nh", q, attention.gauss_direction)


def test_statistics_make_the_arguments_of_rho_standard():
    attention = PeriodicAttention(ModelConfig(**SMALL), 0).double()
    torch.nn.init.normal_(attention.q_proj.bias)
    x = torch.randn(50, 32, dtype=torch.float64)
    a = arguments(attention, x).detach()
    assert not attention.frozen
    attention.freeze_statistics(x)
    assert attention.frozen
    scale, shift = attention.statistics.tolist()
    assert scale == pytest.approx(1 / float(a.std(unbiased=True)), rel=1e-12)  # unbiased: by 199 of 200 numbers
    assert shift == pytest.approx(-float(a.mean()), rel=1e-12)


def test_statistics_are_frozen_numbers_not_parameters():
    attention = PeriodicAttention(ModelConfig(**SMALL), 0)
    assert "statistics" in dict(attention.named_buffers())
    assert "statistics" in attention.state_dict()
    assert "statistics" not in dict(attention.named_parameters())


def test_statistics_add_up_over_workers():
    """Parts that are summed by ``all_reduce`` give the numbers of the whole; 1e-12: sums of another order."""
    whole = PeriodicAttention(ModelConfig(**SMALL), 0).double()
    x = torch.randn(60, 32, dtype=torch.float64)
    whole.freeze_statistics(x)
    parts, sums = x.split([7, 40, 13]), []

    def record(mine):
        sums.append(mine.clone())
        return mine

    for part in parts:  # what each worker sends
        deepcopy(whole).freeze_statistics(part, record)
    worker = PeriodicAttention(ModelConfig(**SMALL), 0).double()
    worker.load_state_dict(whole.state_dict())
    worker.freeze_statistics(parts[1], lambda _: torch.stack(sums).sum(0))
    torch.testing.assert_close(worker.statistics, whole.statistics, rtol=1e-12, atol=0)
    worker.freeze_statistics(parts[1])
    assert abs(float(worker.statistics[0] / whole.statistics[0]) - 1) > 1e-3  # a part alone gives others


@pytest.mark.parametrize("x", [torch.zeros(3, 32), torch.full((1, 32), 2.0)], ids=["all features 0", "omega 0"])
def test_a_first_batch_without_spread_is_refused(x):
    attention = PeriodicAttention(ModelConfig(**SMALL), 0)
    torch.nn.init.zeros_(attention.gauss_direction)
    with pytest.raises(ValueError, match="first training batch has no spread"):
        attention.freeze_statistics(x)
    assert not attention.frozen


@pytest.mark.parametrize("statistics", [(0.0, 0.0), (3.0, 0.25)], ids=["not frozen yet", "frozen"])
def test_attention_is_the_operator_between_projections(statistics):
    """s and t reach rho; before they are frozen, rho takes omega q as it is. 1e-6: the default truncation."""
    config = ModelConfig(**SMALL, positive_func="exp=0.2", scale_real=(1.0, 1.5))
    attention = PeriodicAttention(config, 1).double()
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
        torch.nn.init.normal_(projection.bias)
    scale, shift = statistics
    attention.statistics.copy_(torch.tensor(statistics))
    x, batch = torch.randn(22, 32, dtype=torch.float64), batch_of(*golden_crystals())
    a = arguments(attention, x)
    argument = scale * (a + shift) if scale else a
    expected = attend_real(
        *((x @ p.weight.T + p.bias).view(22, 4, 8) for p in (attention.q_proj, attention.k_proj, attention.v_proj)),
        torch.tensor([[rho("exp", value, 0.2, 0.5) for value in row] for row in argument.tolist()], dtype=x.dtype),
        batch.positions,
        batch.lattice,
        batch.sizes.tolist(),
        scale=1.5,
        rho_min=0.5,
        radial=RadialBasis(count=16, r_max=15.0, width=15 / 16),
        weight=attention.radial_weight,
    )
    expected = expected.reshape(22, 32) @ attention.out_proj.weight.T + attention.out_proj.bias
    torch.testing.assert_close(attention(x, batch), expected, rtol=1e-6, atol=1e-6)


def test_block_is_two_residual_steps():
    block = EncoderBlock(ModelConfig(**SMALL), 0).double()
    for name, parameter in block.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    x, batch = torch.randn(22, 32, dtype=torch.float64), batch_of(*golden_crystals())
    between = x + block.attention(x, batch)
    hidden = functional.relu(between @ block.linear1.weight.T + block.linear1.bias)
    expected = between + hidden @ block.linear2.weight.T + block.linear2.bias
    torch.testing.assert_close(block(x, batch), expected, rtol=1e-12, atol=1e-12)
