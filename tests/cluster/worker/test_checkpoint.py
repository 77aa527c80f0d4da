"""Checkpoints come back as they were written, or say what is wrong with them."""

import json
import math

import pytest
import torch

from cluster.worker.checkpoint import (
    AVERAGE,
    BEST,
    STATE,
    Best,
    CheckpointError,
    Outcome,
    Position,
    TrainState,
    read_checkpoint,
    read_outcome,
    write_checkpoint,
    write_outcome,
)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(4, 3).T,  # not contiguous
        "scalar": torch.tensor(7),
        "half": torch.randn(2).bfloat16(),
    }


FULL = TrainState(
    position=Position(epoch=3, batch=2, step=19, loss=0.1 + 0.2, seconds=12.5),
    weights=tensors(1),
    moments=tensors(2),
    optimizer_step=19,
    average=tensors(3),
    average_count=4,
    best=Best(epoch=2, score=1 / 3, mae={"shear": math.pi, "bulk": 1e-9}),
    best_weights=tensors(4),
)
EARLY = TrainState(position=Position(), weights=tensors(1))
OUTCOME = Outcome(
    facts={"world_size": 2, "device": "cpu: x86_64"},
    models={BEST: tensors(5), AVERAGE: tensors(6)},
    predictions={"truth": torch.rand(5, 2, dtype=torch.float64), BEST: torch.rand(5, 2, dtype=torch.float64)},
)
SETTINGS = {"lr": 1e-3, "target": ["shear"], "run_name": None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.fixture
def folder(tmp_path):
    write_outcome(tmp_path, OUTCOME)
    write_checkpoint(tmp_path, FULL, SETTINGS)
    return tmp_path


@pytest.mark.parametrize("state", [FULL, EARLY], ids=["full", "early"])
def test_a_state_comes_back_exactly(tmp_path, state):
    write_checkpoint(tmp_path, state, SETTINGS)
    found = read_checkpoint(tmp_path)
    for name in ("weights", "moments", "average", "best_weights"):
        assert_same(getattr(found, name), getattr(state, name))
    for name in ("position", "optimizer_step", "average_count", "best"):
        assert getattr(found, name) == getattr(state, name)


def test_an_outcome_comes_back_exactly(folder):
    found = read_outcome(folder)
    assert found.facts == OUTCOME.facts
    assert found.models.keys() == OUTCOME.models.keys()
    for name, weights in OUTCOME.models.items():
        assert_same(found.models[name], weights)
    assert_same(found.predictions, OUTCOME.predictions)


def test_an_unfinished_run_has_no_outcome(tmp_path):
    write_checkpoint(tmp_path, FULL, SETTINGS)
    assert read_outcome(tmp_path) is None


def test_settings_can_be_read_by_anyone(folder):
    assert json.loads((folder / STATE).read_text())["settings"] == SETTINGS


FILES = {
    read_checkpoint: ["state.json", *(f"{n}.safetensors" for n in ("weights", "moments", "average", "best_weights"))],
    read_outcome: ["state.json", "outcome.json", "predictions.safetensors", "model-best.safetensors"],
}
CASES = [(read, name) for read, names in FILES.items() for name in names]


@pytest.mark.parametrize(("read", "name"), CASES)
@pytest.mark.parametrize("harm", ["truncated", "emptied", "altered", "missing"])
def test_harm_is_seen_and_named(folder, read, name, harm):
    path = folder / name
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "altered":  # one digit or bit, in the middle of a number where it is JSON
        spot = next(i for i in range(len(content) // 3, len(content)) if chr(content[i]).isdigit() or name != STATE)
        path.write_bytes(content[:spot] + bytes([content[spot] ^ 1]) + content[spot + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2 if harm == "truncated" else 0])
    with pytest.raises(CheckpointError) as error:
        read(folder)
    assert name in str(error.value)
    assert ("missing" in str(error.value)) == (harm == "missing" and name != STATE)


def test_a_checkpoint_cut_short_is_none(tmp_path):
    """state.json comes last: a crash before it leaves no file of that name."""
    unwritable = {"not JSON": {1, 2}}
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, FULL, unwritable)
    with pytest.raises(CheckpointError, match="cut short"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions_are_refused_by_name(folder, version):
    path = folder / STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": version}))
    with pytest.raises(CheckpointError, match=rf"format {version!r}, this code reads 1"):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", ["[]", "7", '"text"', "{}", "[" * 100_000])
def test_json_that_is_no_record_is_refused(folder, content):
    (folder / STATE).write_text(content)
    with pytest.raises(CheckpointError):
        read_checkpoint(folder)


def test_an_edited_number_in_the_record_is_seen(folder):
    path = folder / STATE
    record = json.loads(path.read_text())
    record["position"]["step"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_checkpoint(folder)
