"""DeepSpeed's settings: what our options make, a user's file over it, and what such a file may not say."""

import json

import pytest

from cluster.errors import UserError
from cluster.settings.deepspeed_config import OWNED, deepspeed_config, overlay_of, read_overlay
from tests.cluster.small import small_config


def file_of(folder, content) -> str:
    path = folder / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def nested(key: str, value):
    first, _, rest = key.partition(".")
    return {first: nested(rest, value) if rest else value}


def test_options_become_deepspeed_settings():
    config = small_config(batch_size=30, gradient_accumulation=2, clip_norm=0.7, zero_stage=2)
    settings = deepspeed_config(config, 4)
    assert settings["train_micro_batch_size_per_gpu"] == 4  # 30 crystals over 8 parts, rounded up
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.7
    assert settings["zero_optimization"] == {"stage": 2}
    assert "torch_autocast" not in settings


def test_stage_0_is_clipped_by_the_engine():
    assert deepspeed_config(small_config(clip_norm=0.7, zero_stage=0), 1)["gradient_clipping"] == 0


def test_bf16_is_autocast():
    assert deepspeed_config(small_config(precision="bf16"), 1)["torch_autocast"]["dtype"] == "bfloat16"


def test_a_file_is_laid_over_what_options_make(tmp_path):
    content = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"device": "cpu"}},
        "steps_per_print": 5,
    }
    config = small_config(zero_stage=3, deepspeed=file_of(tmp_path, content))
    settings = deepspeed_config(config, 2, overlay_of(config))
    assert settings["wall_clock_breakdown"] is True
    assert settings["steps_per_print"] == 5
    assert settings["zero_optimization"] == {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu"},
    }
    assert settings["gradient_accumulation_steps"] == 1


@pytest.mark.parametrize("key", sorted(OWNED))
def test_a_file_may_not_set_what_an_option_sets(tmp_path, key):
    path = file_of(tmp_path, {"wall_clock_breakdown": True, **nested(key, 1)})
    with pytest.raises(UserError) as error:
        read_overlay(path)
    for said in (path, key, OWNED[key]):
        assert said in str(error.value)


@pytest.mark.parametrize("content", [{"optimizer": {"type": "AdamW", "params": {"lr": 1}}}, {"bf16": {}}])
def test_nested_and_empty_conflicts_are_seen(tmp_path, content):
    with pytest.raises(UserError, match="conflicts with --"):
        read_overlay(file_of(tmp_path, content))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1,\n "b": }', "line 2: Expecting value"),
        ("[1, 2]", "must be a JSON object, got list"),
        ("", "line 1"),
        ('{"zero_optimization": 3}', "zero_optimization must be a JSON object"),
        ("[" * 100_000, "more than 50 brackets stand in each other"),
        ('{"a": ' * 200 + "1" + "}" * 200, "more than 50 brackets stand in each other"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "more than 50 brackets stand in each other"),
        ('{"a": ' + "9" * 5000 + "}", "holds an integer of too many digits"),
    ],
    ids=["brace", "list", "empty", "stage", "cut", "objects", "lists", "digits"],
)
def test_files_that_are_no_settings_are_named(tmp_path, content, said):
    path = file_of(tmp_path, content)
    with pytest.raises(UserError) as error:
        read_overlay(path)
    assert str(error.value).startswith(f"deepspeed: {path}: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_as_many_brackets_as_any_settings_have_are_read(tmp_path):
    values = nested(".".join("a" * 50), 1)
    assert read_overlay(file_of(tmp_path, values)) == values
    with pytest.raises(UserError, match="more than 50 brackets"):
        read_overlay(file_of(tmp_path, {"a": values}))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"deepspeed: .*none\.json: No such file"):
        read_overlay(str(tmp_path / "none.json"))


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "ds.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"deepspeed: .*ds\.json: "):
        read_overlay(str(tmp_path / "ds.json"))
