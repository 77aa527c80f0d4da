"""An encoder block as one operation: output and gradients against its parts in float64, and when it is used."""

from typing import get_args

import pytest
import torch

from crystalformer import CrystalBatch, Crystalformer, ModelConfig, fused
from crystalformer.config import PositiveName
from crystalformer.layers import EncoderBlock
from crystalformer.ops.numba import threads as threads_module
from crystalformer.ops.numba.widths import FUNCTIONS
from tests.crystalformer.crystals import batch_of, golden_crystals, random_crystal

SMALL = {"num_layers": 2, "model_dim": 32, "head_num": 4, "ff_dim": 48, "value_pe_dist_real": 16, "scale_real": 0.7}

VARIANTS = {
    "default": {"num_layers": 2},
    "16 heads": {"model_dim": 48, "head_num": 16},
    "12 heads of 5": {"model_dim": 60, "head_num": 12},
    "one head": {"head_num": 1},
    "K=0": {"value_pe_dist_real": 0},
    "one W for all heads": {"value_pe_headed": False},
    "a scale a layer": {"scale_real": (0.5, 0.9)},
    "low bound": {"gauss_lb_real": 0.2},
    **{f"{name}=0.7": {"positive_func": f"{name}=0.7"} for name in get_args(PositiveName)},
    "softplus, another bound": {"positive_func": "softplus", "gauss_lb_real": 0.3},
}


def model_of(batch: CrystalBatch, *, frozen: bool = True, **settings) -> Crystalformer:
    """Biases and all are random; the first layer's arguments of rho then are of either sign."""
    torch.manual_seed(0)
    model = Crystalformer(ModelConfig(**{**SMALL, **settings})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    if frozen:
        model.freeze_statistics(batch)
    return model


def gradients(model: Crystalformer, batch: CrystalBatch) -> dict[str, torch.Tensor]:
    """Of the embedding and every parameter, and the output."""
    model.zero_grad()
    output = model(batch)
    (output * torch.arange(1.0, len(output) + 1).unsqueeze(-1)).sum().backward()
    return {"output": output.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


def in_parts(model: Crystalformer, batch: CrystalBatch, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same by another model, whose hooks keep its blocks from being one operation."""
    other = Crystalformer(model.config, backend="auto" if dtype == torch.float32 else "torch").eval().to(dtype)
    other.load_state_dict(model.state_dict())
    for block in other.blocks:
        block.linear1.register_forward_hook(lambda *_: None)
        assert not fused.takes(block, torch.zeros(1, model.config.model_dim, dtype=dtype))
    return gradients(other, batch)


def off(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest difference, as a part of the largest number; of biases, of their matrix's: k's are nothing."""
    scales = {name: float(exact[name.replace("bias", "weight")].abs().max()) for name in exact}
    return {name: float((found[name] - exact[name]).abs().max()) / scales[name] for name in exact}


def check(batch: CrystalBatch, model: Crystalformer) -> None:
    """To rounding; a gradient that cancels may be off by eight times what the parts are in float32."""
    assert all(fused.takes(block, torch.zeros(1, model.config.model_dim)) for block in model.blocks)
    exact = in_parts(model, batch, torch.float64)
    found, parts = off(gradients(model, batch), exact), off(in_parts(model, batch, torch.float32), exact)
    for name, value in found.items():
        assert value < max(64 * torch.finfo(torch.float32).eps, 8 * parts[name]), (name, found, parts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_and_every_gradient_of_any_variant(variant):
    batch = batch_of(*golden_crystals(), random_crystal(1, seed=0), random_crystal(40, seed=1))
    check(batch, model_of(batch, **VARIANTS[variant]))


@pytest.mark.parametrize("atoms", [1, 31, 33, 300])
def test_output_and_every_gradient_of_any_crystal(atoms):
    """300 atoms: in another order than the batch's."""
    batch = batch_of(random_crystal(atoms, seed=atoms))
    check(batch, model_of(batch_of(*golden_crystals())))


def test_statistics_that_are_not_frozen():
    batch = batch_of(*golden_crystals())
    check(batch, model_of(batch, frozen=False))


def test_functions_are_those_of_the_config():
    assert get_args(PositiveName) == FUNCTIONS


def test_without_gradients_the_output_is_the_same():
    batch = batch_of(*golden_crystals())
    model = model_of(batch)
    with torch.no_grad():
        output = model(batch)
    assert torch.equal(output, gradients(model, batch)["output"])


def test_gradients_add_up():
    batch = batch_of(*golden_crystals())
    model = model_of(batch)
    once = gradients(model, batch)
    output = model(batch)
    (output * torch.arange(1.0, len(output) + 1).unsqueeze(-1)).sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, 2 * once[name]), name


def test_repeats_bit_for_bit_on_any_number_of_threads(monkeypatch):
    """Of the attention and what is around it; PyTorch's matrix products of these sizes keep their order as well."""
    batch = batch_of(*golden_crystals(), random_crystal(70, seed=0), random_crystal(30, seed=1))
    model = model_of(batch)
    monkeypatch.setattr(threads_module, "SHELLS_A_THREAD", 100)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += [gradients(model, batch), gradients(model, batch)]
    finally:
        torch.set_num_threads(before)
    for again in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(again[name], value), name


@pytest.mark.parametrize(
    ("settings", "backend", "dtype"),
    [
        ({"domain": "reci"}, "auto", torch.float32),
        ({"domain": "multihead"}, "auto", torch.float32),
        ({}, "auto", torch.float64),
        ({}, "torch", torch.float32),
        ({}, "reference", torch.float32),
    ],
)
def test_other_blocks_go_part_by_part(settings, backend, dtype):
    block = EncoderBlock(ModelConfig(**SMALL, **settings), 0, backend).to(dtype)
    assert not fused.takes(block, torch.zeros(1, 32, dtype=dtype))


def test_only_the_real_layers_of_a_mixed_model_are_one_operation():
    blocks = [EncoderBlock(ModelConfig(**SMALL, domain="real-reci"), layer) for layer in (0, 1)]
    assert [fused.takes(block, torch.zeros(1, 32)) for block in blocks] == [True, False]


def test_autocast_goes_part_by_part():
    batch = batch_of(*golden_crystals())
    model = model_of(batch)
    exact = gradients(model, batch)["output"]
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.takes(model.blocks[0], torch.zeros(1, 32))
        torch.testing.assert_close(model(batch).float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"]
)
@pytest.mark.parametrize("part", ["attention", "attention.q_proj", "linear2"])
def test_hooks_of_a_part_are_called(part, kind):
    batch = batch_of(*golden_crystals())
    model, called = model_of(batch), []
    getattr(model.blocks[1].get_submodule(part), f"register_{kind}")(lambda *_: called.append(part))
    gradients(model, batch)
    assert called == [part]
