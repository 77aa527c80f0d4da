"""The engine against a plain torch loop over whole batches, in real processes: every stage, worker count, split."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from cluster.data.dealing import global_batches, micro_batches
from cluster.data.feed import Feed, TargetScaling
from cluster.data.tables import SplitTables
from cluster.settings.config import TrainConfig
from cluster.worker.batch_norm import make_global
from cluster.worker.collective import all_reduce
from cluster.worker.engine import (
    MOMENTS,
    AveragedWeights,
    Engine,
    OptimizerState,
    Tensors,
    learning_rate,
    loss_sum,
    make_optimizer,
)
from cluster.worker.machine import Place
from crystalformer import fused
from crystalformer.model import Crystalformer
from tests.cluster.small import SMALL_MODEL, TARGETS, small_config, small_crystals

STAGES = (0, 2, 3)
"""Stage 2 also stands for 1, with which it shares DeepSpeed's optimizer; some tests below have all four."""

STEPS = 5
RECIPE = {"lr": 2e-3, "clip_norm": 0.5, "sch_params": [10.0], "weight_decay": 0.1, "backend": "torch"}
"""Every part of the recipe at work: the norm is clipped, the rate falls, weights decay."""


@dataclass
class Trace:
    """What a run did: by step, and at its end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    weights: Tensors = field(default_factory=dict)
    optimizer: OptimizerState | None = None
    average: Tensors = field(default_factory=dict)


@dataclass
class PlainTrace(Trace):
    """Of the plain loop. ``certain``: where every step's clipped gradient was 0 or well above float32's rounding.

    Adam makes a step of size lr of any gradient, even of one that is rounding alone: keys' biases, which cancel in
    the softmax, and radial functions that no image reaches.
    """

    certain: Tensors = field(default_factory=dict)


@pytest.fixture(scope="module")
def crystals(small_tables):
    return small_crystals(small_tables["train"], 24)


def feed_of(tables: SplitTables) -> Feed:
    feed = Feed(tables, TARGETS, SMALL_MODEL.neighbor_radius, TargetScaling(scale=(0.5, 0.5), bias=(1.5, 2.0)))
    assert feed.num_rows == 24
    return feed


def batches_of(config: TrainConfig, steps: int) -> list[np.ndarray]:
    size = config.data.batch_size
    epochs = range(1, 2 + steps * size // 24)
    return [batch for epoch in epochs for batch in global_batches(24, size, 7, epoch)][:steps]


def new_model(config: TrainConfig, feed: Feed) -> Crystalformer:
    torch.manual_seed(config.run.seed)
    model = Crystalformer(config.model, backend=config.scale.backend)
    model.freeze_statistics(feed.batch(batches_of(config, 1)[0], torch.device("cpu"))[0])
    return model


def plain_loop(tables: SplitTables, config: TrainConfig, steps: int = STEPS) -> PlainTrace:
    """The recipe written down with torch alone."""
    feed = feed_of(tables)
    model = new_model(config, feed)
    optim = config.optim
    named = dict(model.named_parameters())
    kind = torch.optim.AdamW if optim.optimizer == "adamw" else torch.optim.Adam
    optimizer = kind(
        [
            {"params": [p for n, p in named.items() if not n.endswith("bias")], "weight_decay": optim.weight_decay},
            {"params": [p for n, p in named.items() if n.endswith("bias")], "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=optim.adam_betas,
    )
    trace = PlainTrace(certain={name: torch.ones_like(p, dtype=torch.bool) for name, p in named.items()})
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.state_dict().items()}
    for step, rows in enumerate(batches_of(config, steps)):
        batch, target = feed.batch(rows, torch.device("cpu"))
        loss = (model(batch) - target).abs().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        trace.norms.append(float(clip_grad_norm_(model.parameters(), optim.clip_norm or torch.inf)))
        for name, p in named.items():
            trace.certain[name] &= (p.grad == 0) | (p.grad.abs() > 3e-6)
        for group in optimizer.param_groups:
            group["lr"] = optim.lr * (optim.sch_params[0] / (optim.sch_params[0] + step)) ** 0.5
        optimizer.step()
        trace.losses.append(loss.item())
        for name, value in model.state_dict().items():
            sums[name] += value
    trace.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    trace.average = {name: (value / steps).float() for name, value in sums.items()}
    moments = {f"{m}.{name}": optimizer.state[p][m] for name, p in named.items() for m in MOMENTS}
    trace.optimizer = OptimizerState(moments=moments, step=steps)
    return trace


def new_engine(place: Place, tables: SplitTables, flat: dict, resumed: Trace | None = None) -> tuple[Engine, Feed]:
    config = TrainConfig.from_flat(flat)
    feed = feed_of(tables)
    model = new_model(config, feed)
    make_global(model)
    if resumed is not None:
        model.load_state_dict(resumed.weights)
    engine = Engine(model, config, place)
    if resumed is not None:
        engine.load_optimizer_state(resumed.optimizer)
    return engine, feed


def parts_of(place: Place, feed: Feed, rows: np.ndarray, accumulation: int) -> list:
    parts = micro_batches(rows, feed.costs, place.world_size, accumulation)
    return [feed.batch(part[place.rank], torch.device("cpu")) for part in parts]


def run_engine(
    place: Place, tables: SplitTables, flat: dict, span: range = range(STEPS), resumed: Trace | None = None
) -> Trace:
    """Steps ``span`` of the run that ``plain_loop`` does, through the engine; runs in a worker."""
    config = TrainConfig.from_flat(flat)
    engine, feed = new_engine(place, tables, flat, resumed)
    average = AveragedWeights(engine)
    trace = Trace()
    batches = batches_of(config, span.stop)
    for step in span:
        parts = parts_of(place, feed, batches[step], config.optim.gradient_accumulation)
        loss = engine.step(parts, config.data.batch_size, learning_rate(config.optim, step))
        average.update()
        trace.losses.append(float(all_reduce(loss)))
        trace.norms.append(engine.gradient_norm)
    trace.weights = engine.weights()
    trace.optimizer = engine.optimizer_state()
    trace.average = engine.gathered(average.shards)
    return trace


def assert_same_weights(found: Tensors, expected: Tensors, certain: Tensors, tolerance: float = 1e-5) -> None:
    """Every tensor to ``tolerance`` of its norm, over the elements that are certain."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        mask = certain.get(name, torch.ones_like(value, dtype=torch.bool))
        error = ((found[name] - value) * mask).norm() / value.norm().clamp_min(1e-3)
        assert error < tolerance, f"{name}: {error:.1e}"


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def assert_same_run(found: Trace, plain: PlainTrace, *, tolerance: float = 1e-5) -> None:
    assert found.losses == pytest.approx(plain.losses[-len(found.losses) :], rel=tolerance)
    assert found.norms == pytest.approx(plain.norms[-len(found.norms) :], rel=tolerance)
    assert_same_weights(found.weights, plain.weights, plain.certain, tolerance)


# Against the plain loop -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(crystals):
    return plain_loop(crystals, small_config(**RECIPE))


def test_plain_loop_uses_every_part_of_the_recipe(plain):
    """Otherwise a comparison with it says little."""
    assert max(plain.norms) > RECIPE["clip_norm"] > min(plain.norms)
    elements = sum(mask.numel() for mask in plain.certain.values())
    assert sum(int(mask.sum()) for mask in plain.certain.values()) > 0.75 * elements


@pytest.mark.parametrize(
    ("size", "stage", "accumulation"),
    [(1, stage, accumulation) for stage in (0, 3) for accumulation in (1, 2)]
    + [(2, stage, accumulation) for stage in range(4) for accumulation in (1, 2)]
    + [(3, 0, 1), (3, 2, 2), (3, 3, 1)],
)
def test_steps_are_those_of_the_plain_loop(workers, crystals, plain, size, stage, accumulation):
    config = small_config(**RECIPE, zero_stage=stage, gradient_accumulation=accumulation)
    traces = workers(size).run(run_engine, crystals, config.to_flat())
    for trace in traces:
        assert_same_run(trace, plain)
        assert_same_weights(trace.average, plain.average, plain.certain)
        assert trace.optimizer.step == STEPS
        for name, value in plain.optimizer.moments.items():
            assert (trace.optimizer.moments[name] - value).norm() < 1e-4 * value.norm() + 1e-8, name
        assert_same_bits(trace.weights, traces[0].weights)
        assert_same_bits(trace.optimizer.moments, traces[0].optimizer.moments)


def run_counted(place: Place, tables: SplitTables, flat: dict) -> tuple[Trace, int]:
    """``run_engine``, and how often the encoder was one node of autograd (fused.py).

    Of both blocks: statistics are taken block by block.
    """
    calls, encode = [], fused.encode
    fused.encode = lambda blocks, *rest: (calls.append(len(blocks)), encode(blocks, *rest))[1]
    try:
        return run_engine(place, tables, flat), calls.count(2)
    finally:
        fused.encode = encode


@pytest.mark.parametrize(("stage", "calls"), [(0, STEPS), (2, STEPS), (3, 0)])
def test_the_compiled_encoder_takes_the_same_steps(two_workers, crystals, plain, stage, calls):
    config = small_config(**RECIPE | {"backend": "auto"}, zero_stage=stage)
    for trace, counted in two_workers.run(run_counted, crystals, config.to_flat()):
        assert counted == calls
        assert_same_run(trace, plain, tolerance=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_clip_norm_0_clips_nothing_and_still_tells_the_norm(two_workers, crystals, stage):
    recipe = RECIPE | {"clip_norm": 0.0, "optimizer": "adam"}
    expected = plain_loop(crystals, small_config(**recipe), 3)
    found = two_workers.run(run_engine, crystals, small_config(**recipe, zero_stage=stage).to_flat(), range(3))
    assert_same_run(found[0], expected)


@pytest.mark.parametrize("stage", range(4))
def test_batch_norm_is_that_of_the_whole_batch(two_workers, crystals, stage):
    layers = {"norm_type": "bn", "pre_pooling_op": "w+bn+relu", "embedding_dim": [32, 32]}
    config = small_config(**RECIPE, **layers, zero_stage=stage)
    expected = plain_loop(crystals, config, 3)
    found = two_workers.run(run_engine, crystals, config.to_flat(), range(3))[0]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-4)
    # A bias before a batch norm has no gradient but rounding's, so the means agree for one step only.
    expected = plain_loop(crystals, config, 1)
    found = two_workers.run(run_engine, crystals, config.to_flat(), range(1))[0]
    statistics = {name: value for name, value in expected.weights.items() if "running" in name or "tracked" in name}
    assert len(statistics) == 2 * 3
    for name, value in statistics.items():
        assert torch.allclose(found.weights[name], value, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("size", [2, 3])
def test_batch_norm_of_parts_does_not_depend_on_the_workers(workers, crystals, size):
    config = small_config(**RECIPE, norm_type="bn", gradient_accumulation=2)
    alone = workers(1).run(run_engine, crystals, config.to_flat())[0]
    found = workers(size).run(run_engine, crystals, config.to_flat())[0]
    assert found.losses == pytest.approx(alone.losses, rel=1e-5)
    assert found.norms == pytest.approx(alone.norms, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_close(two_workers, crystals, plain, stage):
    config = small_config(**RECIPE, precision="bf16", zero_stage=stage)
    trace = two_workers.run(run_engine, crystals, config.to_flat())[0]
    assert trace.losses == pytest.approx(plain.losses, rel=0.03)
    assert trace.losses != pytest.approx(plain.losses, rel=1e-6)
    assert {value.dtype for value in trace.weights.values()} == {torch.float32}
    assert {value.dtype for value in trace.optimizer.moments.values()} == {torch.float32}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_takes_the_same_steps(two_workers, crystals, plain, tmp_path, stage):
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}')
    config = small_config(**RECIPE, zero_stage=stage, deepspeed=str(file))
    trace = two_workers.run(run_engine, crystals, config.to_flat())[0]
    assert_same_run(trace, plain)
    for name, value in plain.optimizer.moments.items():
        assert (trace.optimizer.moments[name] - value).norm() < 1e-4 * value.norm() + 1e-8, name


# Going on -------------------------------------------------------------------------------------------------------


def loaded_state(place: Place, tables: SplitTables, flat: dict, resumed: Trace) -> tuple[OptimizerState, Tensors]:
    """What an engine hands out right after it took a state up."""
    engine, _ = new_engine(place, tables, flat, resumed)
    return engine.optimizer_state(), engine.weights()


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [
        ((3, 2), (0, 1)),
        ((0, 1), (3, 2)),
        ((2, 2), (1, 1)),
        ((1, 3), (2, 2)),
        ((3, 2), (3, 3)),
        ((0, 2), (1, 3)),
        ((0, 2), (0, 2)),
        ((2, 2), (2, 2)),
        ((3, 2), (3, 2)),
    ],
    ids=lambda pair: f"stage{pair[0]}x{pair[1]}",
)
def test_a_run_goes_on_at_any_stage_on_any_workers(workers, crystals, plain, saved, loaded):
    """(stage, workers) that saved and that go on."""
    before, after = (small_config(**RECIPE, zero_stage=stage).to_flat() for stage, _ in (saved, loaded))
    first = workers(saved[1]).run(run_engine, crystals, before, range(3))[0]
    state, weights = workers(loaded[1]).run(loaded_state, crystals, after, first)[0]
    assert state.step == first.optimizer.step == 3
    assert_same_bits(state.moments, first.optimizer.moments)
    assert_same_bits(weights, first.weights)

    second = workers(loaded[1]).run(run_engine, crystals, after, range(3, STEPS), first)[0]
    assert_same_run(second, plain)
    assert second.optimizer.step == STEPS
    if saved == loaded:  # the same sums in the same order
        whole = workers(loaded[1]).run(run_engine, crystals, after)[0]
        assert second.losses == whole.losses[3:]
        assert second.norms == whole.norms[3:]
        assert_same_bits(second.weights, whole.weights)
        assert_same_bits(second.optimizer.moments, whole.optimizer.moments)


def average_in_two_halves(place: Place, tables: SplitTables, flat: dict) -> tuple[Tensors, Tensors]:
    """An average handed out after 2 steps and taken up again, and one that went through."""
    config = TrainConfig.from_flat(flat)
    engine, feed = new_engine(place, tables, flat)
    average = through = AveragedWeights(engine)
    for step, rows in enumerate(batches_of(config, 4)):
        engine.step(parts_of(place, feed, rows, 1), config.data.batch_size, config.optim.lr)
        if step == 2:
            average = AveragedWeights(engine, engine.gathered(through.shards), through.count)
        for each in {id(average): average, id(through): through}.values():
            each.update()
    return engine.gathered(average.shards), engine.gathered(through.shards)


@pytest.mark.parametrize("stage", [0, 3])
def test_an_average_goes_on_from_full_weights(two_workers, crystals, stage):
    halves, whole = two_workers.run(
        average_in_two_halves, crystals, small_config(**RECIPE, zero_stage=stage).to_flat()
    )[0]
    assert_same_bits(halves, whole)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_to_hand_out_before_the_first_step(two_workers, crystals, stage):
    trace = two_workers.run(run_engine, crystals, small_config(zero_stage=stage).to_flat(), range(0))[0]
    assert (trace.optimizer.step, trace.optimizer.moments) == (0, {})
    config = small_config(zero_stage=stage)
    assert_same_bits(trace.weights, dict(new_model(config, feed_of(crystals)).state_dict()))


# Other weights for a while --------------------------------------------------------------------------------------


def borrow(place: Place, tables: SplitTables, flat: dict, other: Tensors) -> dict[str, Any]:
    """Train 2 steps, evaluate with ``other`` weights, train 1 more; and the same without the evaluation."""
    config = TrainConfig.from_flat(flat)
    results: dict[str, Any] = {}
    for name in ("straight", "borrowing"):
        engine, feed = new_engine(place, tables, flat)
        batch = feed.batch(np.arange(6), place.device)[0]
        steps = [parts_of(place, feed, rows, 1) for rows in batches_of(config, 3)]
        for parts in steps[:2]:
            engine.step(parts, config.data.batch_size, config.optim.lr)
        if name == "borrowing":
            own = engine.predict(batch)
            with engine.loaded(other):
                results["other_prediction"] = engine.predict(batch)
                results["other_weights"] = engine.weights()
            results["own_again"] = bool(torch.equal(engine.predict(batch), own))
            results["own_prediction"], results["own_weights"] = own, engine.weights()
            with pytest.raises(KeyError), engine.loaded(other):
                raise KeyError
            results["own_after_error"] = bool(torch.equal(engine.predict(batch), own))
        engine.step(steps[2], config.data.batch_size, config.optim.lr)
        results[name] = engine.weights()
    return results


@pytest.mark.parametrize(("size", "stage"), [(1, 0), (1, 3), *((2, stage) for stage in range(4))])
def test_loaded_weights_predict_and_leave_no_trace(workers, crystals, stage, size):
    config = small_config(**RECIPE, zero_stage=stage)
    feed = feed_of(crystals)
    batch = feed.batch(np.arange(6), torch.device("cpu"))[0]
    model = new_model(config, feed).eval()
    other = {name: value * 1.25 for name, value in model.state_dict().items()}
    results = workers(size).run(borrow, crystals, config.to_flat(), other)[-1]

    def predicted(weights):
        model.load_state_dict(weights)
        with torch.no_grad():
            return model(batch)

    assert_same_bits(results["other_weights"], other)
    assert torch.allclose(results["other_prediction"], predicted(other), rtol=1e-5, atol=1e-6)
    assert torch.allclose(results["own_prediction"], predicted(results["own_weights"]), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results["own_prediction"], results["other_prediction"], rtol=1e-2)
    assert results["own_again"]
    assert results["own_after_error"]
    assert_same_bits(results["borrowing"], results["straight"])


# Recipe ---------------------------------------------------------------------------------------------------------


def test_learning_rate_falls_with_the_inverse_square_root():
    optim = small_config(lr=1e-3, sch_params=[4000.0]).optim
    assert learning_rate(optim, 0) == 1e-3
    assert learning_rate(optim, 12000) == pytest.approx(5e-4)
    assert learning_rate(small_config(lr=1e-3, lr_sch="const").optim, 12000) == 1e-3


@pytest.mark.parametrize(("function", "expected"), [("L1", 3.5), ("MSE", 9.25), ("Smooth_L1", 2.625)])
def test_losses_are_sums_over_crystals_and_targets(function, expected):
    output, target = torch.tensor([[0.0, 1.0], [3.0, 0.0]]), torch.tensor([[0.5, 1.0], [0.0, 0.0]])
    assert loss_sum(output, target, function).item() == pytest.approx(expected)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_all_but_biases_decay(name, kind):
    config = small_config(optimizer=name, weight_decay=0.3, adam_betas=[0.8, 0.9])
    model = Crystalformer(config.model)
    optimizer = make_optimizer(model, config.optim)
    assert type(optimizer).__bases__ == (kind,)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert {n: decays[id(p)] for n, p in named.items()} == {n: 0.0 if "bias" in n else 0.3 for n in named}
    assert all(group["betas"] == (0.8, 0.9) for group in optimizer.param_groups)
