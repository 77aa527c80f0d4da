"""``crystalformer evaluate``."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.errors import UserError
from cluster.log import say
from cluster.paths import lasting, there
from data_pipeline.splits import SPLITS
from data_pipeline.text import printable

if TYPE_CHECKING:
    from cluster.prediction.scoring import Scored
    from crystalformer.artifact import TargetScale

_log = logging.getLogger(__name__)

HELP = "compare a trained model's predictions with a data set"

WORST = 5
ELEMENTS_A_LINE = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, on which split of which data set, and where to draw it."""
    from cluster.commands.options import add_data_dir, add_device

    parser.add_argument(
        "model", metavar="MODEL", type=there, help="model folder, such as runs/NAME/model, also s3://..."
    )
    parser.add_argument(
        "--dataset", metavar="NAME", help="data set that has the model's targets (default: the one it was trained on)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="part of the data set (default test)")
    drawing = parser.add_mutually_exclusive_group()
    drawing.add_argument(
        "--plot",
        metavar="FILE",
        type=lasting,
        help="where predictions are drawn over true values (default: parity-NAME-SPLIT.png in this folder)",
    )
    drawing.add_argument("--no_plot", action="store_true", help="draw nothing")
    add_data_dir(parser)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Print the errors and draw. UserError or DataError for a model, data set or FILE that cannot be used."""
    if args.plot is not None:
        check_plot(Path(args.plot))
    from cluster.prediction.predict import load_predictor, pick_device
    from cluster.prediction.scoring import score_split

    device = pick_device(args.device)
    predictor = load_predictor(args.model, device)
    dataset = args.dataset or predictor.card.provenance.get("dataset")
    if not dataset:
        raise UserError(f"--dataset is needed: {args.model} does not say what it was trained on")
    scored = score_split(predictor, device, dataset, args.split, Path(args.data_dir))
    targets = predictor.card.targets
    say(f"{scored.dataset} {args.split}: {len(scored.ids)} crystals")
    for column, target in enumerate(targets):
        say("\n".join(["", *summary(scored, column, target)]))
    if not args.no_plot:
        plot(args.plot, scored, args.split, targets)


def summary(scored: Scored, column: int, target: TargetScale) -> list[str]:
    """What is told of one target: errors, the worst structures, errors by cell size and by element."""
    from cluster.prediction.scoring import errors_of, mae_by_element, mae_by_size, worst
    from cluster.run.report import with_unit

    errors = errors_of(scored.truth[:, column], scored.prediction[:, column])
    lines = [
        f"{target.name}",
        f"  MAE       {with_unit(errors.mae, target.unit)}",
        f"  RMSE      {with_unit(errors.rmse, target.unit)}",
        f"  R²        {errors.r2:.4f}",
    ]
    for row in worst(scored, column, WORST):
        true, predicted = scored.truth[row, column], scored.prediction[row, column]
        lines.append(
            f"  worst     {scored.ids[row]}: {with_unit(predicted, target.unit)}, in truth {true:.4f} "
            f"({scored.sizes[row]} atoms)"
        )
    for name, count, mae in mae_by_size(scored, column):
        lines.append(f"  MAE of    {count} crystals with {name} atoms: {with_unit(mae, target.unit)}")
    elements = [f"{symbol} {mae:.4f} ({count})" for symbol, count, mae in mae_by_element(scored, column)]
    for start in range(0, len(elements), ELEMENTS_A_LINE):
        lines.append(f"  MAE with  {', '.join(elements[start : start + ELEMENTS_A_LINE])}")
    return [printable(line) for line in lines]


def plot(file: str | None, scored: Scored, split: str, targets: tuple[TargetScale, ...]) -> None:
    """Draw and say where. UserError where a FILE that was asked for cannot be written, else a warning."""
    place = Path(lasting(f"parity-{scored.dataset}-{split}.png") if file is None else file)
    try:
        draw(place, scored, targets)
    except (OSError, ValueError) as error:
        if file is not None:
            raise _no_plot(place, error) from error
        _log.warning("no plot: %s: %s", place, getattr(error, "strerror", None) or error)
        return
    say(f"\nplot      {place}")


def draw(file: Path, scored: Scored, targets: tuple[TargetScale, ...]) -> None:
    """Draw predictions over true values. OSError or ValueError where it cannot be written."""
    from cluster.prediction.plots import plot_parity  # matplotlib is slow to import

    units = {target.name: target.unit for target in targets}
    plot_parity(file, list(units), units, scored.truth, scored.prediction)


def check_plot(file: Path) -> None:
    """UserError where no picture can be written there: told before the predictions, which may take long."""
    from cluster.prediction.plots import check_place

    try:
        check_place(file)
    except (OSError, ValueError) as error:
        raise _no_plot(file, error) from error


def _no_plot(file: Path, error: OSError | ValueError) -> UserError:
    return UserError(f"--plot {file}: {getattr(error, 'strerror', None) or error}")
