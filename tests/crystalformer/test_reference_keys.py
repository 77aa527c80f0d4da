"""The authors' checkpoint keys: every architecture goes there and back bit by bit; what does not fit is named."""

import pytest
import torch

from crystalformer import Crystalformer, ModelConfig
from crystalformer.reference_keys import from_reference, to_reference
from tests.crystalformer import golden
from tests.crystalformer.crystals import batch_of, golden_crystals

SMALL = {
    "model_dim": 32,
    "head_num": 4,
    "ff_dim": 48,
    "num_layers": 2,
    "embedding_dim": (24, 20),
    "value_pe_dist_real": 16,
}

ARCHITECTURES = [
    {},
    {"value_pe_dist_real": 0},
    {"value_pe_headed": False},
    {"norm_type": "bn"},
    {"pre_pooling_op": "w+bn+relu", "norm_type": "bn"},
    {"pre_pooling_op": "w+relu"},
    {"domain": "multihead"},
    {"domain": "multihead", "value_pe_headed": False},
    {"domain": "multihead", "head_num": 2},
    {"domain": "real-reci"},
    {"num_targets": 3},
]


def trained(**settings) -> Crystalformer:
    """A model none of whose numbers is at its initial value."""
    model = Crystalformer(ModelConfig(**{**SMALL, **settings}))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_().abs_()
    return model


@pytest.mark.parametrize("settings", ARCHITECTURES, ids=str)
def test_there_and_back_is_the_same_bit_for_bit(settings):
    model, other = trained(**settings), trained(**settings)
    other.load_reference_state_dict(to_reference(model))
    before, after = model.state_dict(), other.state_dict()
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    batch = batch_of(*golden_crystals())
    assert torch.equal(model.eval()(batch), other.eval()(batch))


@pytest.mark.parametrize("name", golden.NAMES)
def test_keys_shapes_and_values_are_the_authors(name):
    vectors = golden.load(name)
    written = to_reference(vectors.model())
    assert {key: tuple(value.shape) for key, value in written.items()} == {
        key: tuple(value.shape) for key, value in vectors.weights.items()
    }
    for key, value in vectors.weights.items():
        assert torch.equal(written[key], value), key


def test_keys_of_norm_and_of_the_projection_before_pooling():
    keys = set(to_reference(trained(norm_type="bn", pre_pooling_op="w+bn+relu")))
    assert {"mlp.0.weight", "mlp.1.running_mean", "mlp.1.num_batches_tracked", "mlp.3.weight"} <= keys
    assert {"proj_before_pooling.0.weight", "proj_before_pooling.1.running_var"} <= keys


def test_multihead_keeps_the_projection_of_all_heads_as_the_authors_do():
    """Theirs has one for each of the H heads and reads those of the first half, which attend in real space."""
    model = trained(domain="multihead")
    weights = to_reference(model)
    key = "encoder.layers.0.self_attn.pe_dist_proj"
    assert weights[key].shape == (1, 4, 8, 16)
    assert torch.equal(weights[key][0, :2], model.blocks[0].attention.radial_weight)
    weights[key][0, 2:] = 5.0  # not read
    other = trained(domain="multihead")
    other.load_reference_state_dict(weights)
    assert torch.equal(other.blocks[0].attention.radial_weight, model.blocks[0].attention.radial_weight)


MISSING = [
    "input_embeddings.weight",
    "encoder.layers.1.self_attn.gauss_scale",
    "encoder.layers.0.self_attn.in_proj_bias",
    "encoder.layers.0.self_attn.pe_dist_proj",
    "encoder.layers.1.linear2.bias",
    "mlp.3.weight",
]


@pytest.mark.parametrize("key", MISSING)
def test_a_missing_key_is_named(key):
    weights = to_reference(trained())
    del weights[key]
    with pytest.raises(KeyError, match=f"reference weights lack '{key}'"):
        trained().load_reference_state_dict(weights)


def test_constants_of_the_authors_need_not_be_there():
    model, other = trained(), trained()
    weights = {key: value for key, value in to_reference(model).items() if not key.endswith("atten_scale")}
    other.load_reference_state_dict(weights)
    assert torch.equal(other.embedding, model.embedding)


@pytest.mark.parametrize(
    ("theirs", "ours", "key"),
    [
        ({"num_layers": 3}, {}, "encoder.layers.2"),
        ({}, {"value_pe_dist_real": 0}, "encoder.layers.0.self_attn.pe_dist_proj"),
        ({"embedding_dim": (24, 20, 16)}, {}, "mlp.9"),
        ({"norm_type": "bn"}, {}, "mlp.1"),
    ],
)
def test_weights_of_a_larger_architecture_are_named(theirs, ours, key):
    with pytest.raises(ValueError, match=f"reference weights hold '{key}.*', which this architecture lacks"):
        trained(**ours).load_reference_state_dict(to_reference(trained(**theirs)))


@pytest.mark.parametrize(
    ("key", "shape", "expected"),
    [
        ("input_embeddings.weight", (32, 100), (98, 32)),
        ("encoder.layers.0.self_attn.in_proj_bias", (64,), (96,)),
        ("encoder.layers.0.self_attn.pe_dist_proj", (1, 4, 8, 32), (4, 8, 16)),
        ("encoder.layers.0.self_attn.lattice_pos_weights", (16,), (4, 8)),
        ("encoder.layers.1.linear1.weight", (48, 64), (48, 32)),
    ],
)
def test_a_wrong_shape_is_named(key, shape, expected):
    weights = {**to_reference(trained()), key: torch.zeros(shape)}
    with pytest.raises(ValueError) as refusal:
        trained().load_reference_state_dict(weights)
    assert f"'{key}'" in str(refusal.value)
    assert f"not {expected}" in str(refusal.value)


def test_a_refused_file_leaves_the_model_as_it_was():
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError):
        model.load_reference_state_dict({**to_reference(trained()), "mlp.0.weight": torch.zeros(1)})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_double_weights_load_into_a_float_model():
    model = trained()
    vectors = {key: value.double() for key, value in to_reference(trained()).items()}
    model.load_reference_state_dict(vectors)
    assert model.embedding.dtype == torch.float32
    assert from_reference(vectors, model)["embedding"].dtype == torch.float64
