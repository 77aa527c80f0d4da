"""Reading settings from dataclass annotations, from values and from words."""

from dataclasses import dataclass, field, replace

import pytest

from cluster.settings.fields import Required, coerce, parse_words, specs_of
from cluster.settings.workers import WorkerRange


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    count: int = field(default=1, metadata={"help": "a count", "unit": "Å"})
    width: float | None = field(default=None, metadata={"help": "a width", "unit": ""})
    sizes: tuple[int, ...] = field(default_factory=lambda: (1, 2), metadata={"help": "sizes", "unit": ""})
    flag: bool = field(metadata={"help": "a flag", "unit": ""})


SPECS = {spec.name: spec for spec in specs_of(Sample)}


def test_annotations_are_read():
    assert [(s.kind, s.many, s.optional) for s in SPECS.values()] == [
        (int, False, False),
        (float, False, True),
        (int, True, False),
        (bool, False, False),
    ]
    assert [s.default for s in SPECS.values()] == [1, None, (1, 2), Required]
    assert (SPECS["count"].help, SPECS["count"].unit) == ("a count", "Å")


def test_an_annotation_that_is_no_setting_is_refused():
    @dataclass
    class Odd:
        thing: dict[str, int] = field(default_factory=dict, metadata={"help": "", "unit": ""})

    with pytest.raises(TypeError, match="a setting cannot have the annotation"):
        specs_of(Odd)


@pytest.mark.parametrize("value", ["x" * 10_000, ["x"] * 10_000, {"a": ["x"] * 10_000}])
def test_a_message_repeats_the_beginning_of_a_long_value(value):
    for spec in SPECS.values():
        with pytest.raises(ValueError, match=f"^{spec.name} must be .*, got .*xx?.*\\.\\.\\.$") as refused:
            coerce(spec, value)
        assert len(str(refused.value)) < 150
    with pytest.raises(ValueError, match=r"^workers must be a number of workers .*\.\.\.$") as refused:
        coerce(replace(SPECS["count"], name="workers", kind=WorkerRange), value)
    assert len(str(refused.value)) < 160


@pytest.mark.parametrize(
    ("name", "words", "value"),
    [
        ("count", [" -3"], -3),
        ("width", ["1e-3"], 1e-3),
        ("width", ["none"], None),
        ("sizes", ["1", "2"], (1, 2)),
        ("sizes", ["1,2,", "3"], (1, 2, 3)),
        ("flag", ["False"], False),
    ],
)
def test_words_become_values(name, words, value):
    assert parse_words(SPECS[name], words) == value


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("count", ["1.5"], "count must be an integer, got '1.5'"),
        ("count", ["none"], "count must be an integer, got 'none'"),
        ("width", ["inf"], "width must be a number, or none, got 'inf'"),
        ("sizes", ["1", "x"], "sizes must be one or more integers, got '1 x'"),
        ("flag", ["1"], "flag must be true or false, got '1'"),
    ],
)
def test_wrong_words_are_refused(name, words, message):
    with pytest.raises(ValueError, match=message):
        parse_words(SPECS[name], words)


def test_integers_beyond_a_float_are_no_numbers():
    with pytest.raises(ValueError, match="width must be a number, or none, got 1000"):
        coerce(SPECS["width"], 10**400)


def test_values_keep_their_type():
    assert coerce(SPECS["width"], 2) == 2.0
    assert coerce(SPECS["sizes"], 5) == (5,)
    for wrong in (1.0, "1", True, None, [1]):
        with pytest.raises(ValueError, match="count must be an integer"):
            coerce(SPECS["count"], wrong)
