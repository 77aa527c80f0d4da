"""ModelConfig: the paper's defaults, what is refused, what follows from the fields."""

import dataclasses
import json
import math

import pytest

from crystalformer import ModelConfig
from crystalformer.config import PositiveFunction

PAPER = {
    "num_layers": 4,
    "model_dim": 128,
    "head_num": 8,
    "ff_dim": 512,
    "embedding_dim": (128,),
    "domain": "real",
    "scale_real": (1.4,),
    "scale_reci": (2.2,),
    "gauss_lb_real": 0.5,
    "gauss_lb_reci": 0.5,
    "positive_func": "elu=0.1",
    "value_pe_dist_real": 64,
    "value_pe_dist_max": -10.0,
    "value_pe_width_scale": 1.0,
    "value_pe_headed": True,
    "pooling": "avr",
    "norm_type": "no",
    "pre_pooling_op": "no",
    "num_targets": 1,
}


@pytest.mark.parametrize("name", PAPER)
def test_default_is_the_papers(name):
    assert getattr(ModelConfig(), name) == PAPER[name]


def test_every_field_says_what_it_means():
    for field in dataclasses.fields(ModelConfig):
        assert field.metadata["help"], field.name
    assert {f.name for f in dataclasses.fields(ModelConfig)} == {*PAPER, "cutoff_sigmas"}


NAN, INFINITY = math.nan, math.inf
REFUSED = [
    ("num_layers", 0, "at least 1"),
    ("num_layers", 2.0, "an integer"),
    ("num_layers", True, "an integer"),
    ("model_dim", 0, "at least 1"),
    ("head_num", -8, "at least 1"),
    ("head_num", 3, "divisor of model_dim=128"),
    ("ff_dim", 0, "at least 1"),
    ("num_targets", 0, "at least 1"),
    ("embedding_dim", (), "one or more"),
    ("embedding_dim", (128, 0), "at least 1"),
    ("embedding_dim", (64.5,), "integers"),
    ("embedding_dim", None, "integers"),
    ("value_pe_dist_real", 8, "multiple of 16"),
    ("value_pe_dist_real", -16, "multiple of 16"),
    ("value_pe_dist_real", 16.0, "multiple of 16"),
    ("domain", "imaginary", "one of real, reci, multihead, real-reci, reci-real"),
    ("pooling", "sum", "one of avr, max"),
    ("norm_type", "ln", "one of no, bn"),
    ("pre_pooling_op", "tanh", "one of no, relu, w\\+relu, w\\+bn\\+relu"),
    ("value_pe_headed", 1, "true or false"),
    ("positive_func", "gelu", "one of elu, abs, exp, softplus, sigmoid"),
    ("scale_real", (10**400,), "greater than 0"),
    ("positive_func", "elu=", "beta from 0.0001 to 10000"),
    ("positive_func", "elu=0", "beta from 0.0001 to 10000"),
    ("positive_func", "elu=-1", "beta from 0.0001 to 10000"),
    ("positive_func", "elu=big", "beta from 0.0001 to 10000"),
    ("positive_func", "softplus=1e-320", "beta from 0.0001 to 10000"),
    ("positive_func", "elu=inf", "beta from 0.0001 to 10000"),
    ("scale_real", -1.4, "greater than 0"),
    ("scale_real", 0, "greater than 0"),
    ("scale_real", (1.4, 0.0), "greater than 0"),
    ("scale_real", (), "greater than 0"),
    ("scale_real", (NAN,), "greater than 0"),
    ("scale_real", "wide", "greater than 0"),
    ("scale_real", None, "greater than 0"),
    ("scale_reci", -2.2, "greater than 0"),
    ("scale_reci", (INFINITY,), "greater than 0"),
    ("gauss_lb_real", 0.0, "between 0 and 1"),
    ("gauss_lb_real", 1.0, "between 0 and 1"),
    ("gauss_lb_real", "0.5", "between 0 and 1"),
    ("gauss_lb_reci", -0.1, "between 0 and 1"),
    ("gauss_lb_reci", 1.5, "between 0 and 1"),
    ("value_pe_dist_max", 0.0, "other than 0"),
    ("value_pe_dist_max", NAN, "other than 0"),
    ("value_pe_width_scale", 0.0, "greater than 0"),
    ("cutoff_sigmas", 0.5, "between 1 and 12"),
    ("cutoff_sigmas", 13, "between 1 and 12"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), REFUSED)
def test_value_error_names_field_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ValueError, match=rf"^{name} must be .*{allowed}.*, got ") as refusal:
        ModelConfig(**{name: value})
    shown = value[0] if isinstance(value, tuple) and len(value) == 1 and name.startswith("scale") else value
    assert repr(shown)[:77] in str(refusal.value)


@pytest.mark.parametrize(
    ("value", "end"),
    [
        ("x" * 78, "'" + "x" * 78 + "'"),
        ("x" * 79, "'" + "x" * 76 + "..."),
        (-(16**6000), "a value of type int"),
        (("x",) * 10**6, "'x', 'x', 'x', '..."),
    ],
    ids=["as it is", "long", "digits", "many"],
)
def test_a_message_repeats_no_more_than_the_beginning_of_a_value(value, end):
    with pytest.raises(ValueError, match="^norm_type must be ") as refusal:
        ModelConfig(norm_type=value)
    message = str(refusal.value)
    assert message.endswith(end) and len(message.split("got ")[1]) <= 80


def test_every_field_has_a_refused_value():
    assert {name for name, _, _ in REFUSED} == {f.name for f in dataclasses.fields(ModelConfig)}


def test_multihead_needs_an_even_number_of_heads():
    with pytest.raises(ValueError, match="head_num must be even where domain is multihead, got 3"):
        ModelConfig(domain="multihead", head_num=3, model_dim=96)


@pytest.mark.parametrize("value", [0, 16, 128])
def test_multiples_of_16_are_accepted(value):
    assert ModelConfig(value_pe_dist_real=value).value_pe_dist_real == value


def test_a_number_is_a_list_of_one():
    config = ModelConfig(scale_real=2, scale_reci=3.5, embedding_dim=64)
    assert (config.scale_real, config.scale_reci, config.embedding_dim) == ((2,), (3.5,), (64,))
    assert ModelConfig(embedding_dim=[128, 64]).embedding_dim == (128, 64)


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ModelConfig().num_layers = 7


@pytest.mark.parametrize(
    ("text", "name", "beta"),
    [("elu=0.1", "elu", 0.1), ("abs", "abs", 1.0), ("softplus=2", "softplus", 2.0), ("exp=1e-1", "exp", 0.1)],
)
def test_positive_function_is_a_name_and_beta(text, name, beta):
    assert PositiveFunction.parse(text) == PositiveFunction(name=name, beta=beta)
    assert ModelConfig(positive_func=text).positive == PositiveFunction(name=name, beta=beta)


def test_layers_take_the_scales_in_turn():
    config = ModelConfig(num_layers=5, scale_real=(1.0, 1.8), scale_reci=(2.0, 2.5, 3.0))
    assert [config.layer_scale_real(n) for n in range(5)] == [1.0, 1.8, 1.0, 1.8, 1.0]
    assert [config.layer_scale_reci(n) for n in range(5)] == [2.0, 2.5, 3.0, 2.0, 2.5]


@pytest.mark.parametrize(
    ("domain", "layers"),
    [
        ("real", ["real"] * 3),
        ("reci", ["reci"] * 3),
        ("multihead", ["multihead"] * 3),
        ("real-reci", ["real", "reci", "real"]),
        ("reci-real", ["reci", "real", "reci"]),
    ],
)
def test_domains_alternate_from_the_first_named(domain, layers):
    assert [ModelConfig(domain=domain).layer_domain(n) for n in range(3)] == layers


def test_radial_maximum_is_a_length_or_so_many_scales():
    assert ModelConfig(value_pe_dist_max=12.0, scale_real=(1.0, 1.8)).radial_max(1) == 12.0
    assert ModelConfig(value_pe_dist_max=-10.0, scale_real=(1.0, 1.8)).radial_max(1) == pytest.approx(18.0)


def test_head_dim():
    assert ModelConfig(model_dim=96, head_num=4).head_dim == 24


@pytest.mark.parametrize(
    ("settings", "radius"),
    [
        ({}, 6 * 1.4 / math.sqrt(0.5)),
        ({"gauss_lb_real": 0.25, "cutoff_sigmas": 5.0}, 5 * 1.4 / 0.5),
        ({"scale_real": (1.0, 1.8)}, 6 * 1.8 / math.sqrt(0.5)),
        ({"scale_real": (1.0, 1.8), "num_layers": 1}, 6 * 1.0 / math.sqrt(0.5)),  # the layer of 1.8 does not exist
        ({"scale_real": (1.0, 1.8), "domain": "real-reci"}, 6 * 1.0 / math.sqrt(0.5)),  # it is reciprocal
        ({"domain": "reci"}, 0.0),
    ],
)
def test_neighbor_radius_holds_the_widest_gaussian_of_any_layer(settings, radius):
    assert ModelConfig(**settings).neighbor_radius == pytest.approx(radius)


def test_plain_values_and_back_through_json():
    config = ModelConfig(num_layers=2, scale_real=(1.0, 1.8), domain="reci-real", embedding_dim=(64, 32))
    values = json.loads(json.dumps(config.to_dict()))
    assert values["scale_real"] == [1.0, 1.8]
    assert ModelConfig.from_dict(values) == config
    assert ModelConfig.from_dict({}) == ModelConfig()


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="unknown model setting 'num_layer'; known are .*num_layers"):
        ModelConfig.from_dict({"num_layer": 3})
