"""Which rows are for training, validation and test: the recipe of the published benchmarks.

The indices 0..n-1 are shuffled by Python's ``random`` seeded 123. train is the first n_train of them, test the last
n_test, val the n_val before those. Sizes by ratio are int(ratio * n): rows left over by rounding lie in no split.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from data_pipeline.errors import DataError
from data_pipeline.info import SplitRecipe, SplitSizes

SPLITS = ("train", "val", "test")
UNUSED = -1
"""Code of a row that lies in no split; 0, 1, 2 are train, val, test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Row indices of the three splits, in the recipe's order."""

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]


def split_sizes(n: int, recipe: SplitRecipe) -> SplitSizes:
    """How many of ``n`` rows each split gets. Raises DataError where they do not suffice."""
    if recipe.sizes is not None:
        sizes = recipe.sizes
    else:
        check_ratios(recipe.ratios)
        # As the decimals they were written: 0.7 * 90 is less than 63 in binary.
        train, val, test = (int(Fraction(str(ratio)) * n) for ratio in recipe.ratios)
        sizes = SplitSizes(train=train, val=val, test=test)
    if min(sizes.train, sizes.val, sizes.test) < 1:
        raise DataError(
            f"{n} usable rows split {recipe.ratios} give {sizes.train} train, {sizes.val} val and {sizes.test} test; "
            f"each split needs at least 1 row"
        )
    if sizes.train + sizes.val + sizes.test > n:
        raise DataError(f"{n} usable rows are fewer than the {sizes.train} + {sizes.val} + {sizes.test} of the split")
    return sizes


def check_ratios(ratios: Sequence[float]) -> None:
    """Raises DataError unless there are three ratios above 0 that sum to 1 or less."""
    if len(ratios) != 3 or not all(0 < ratio < 1 for ratio in ratios) or sum(ratios) > 1 + 1e-9:
        raise DataError(f"split {tuple(ratios)}: give train, val and test ratios above 0 with a sum of at most 1")


def make_split(n: int, recipe: SplitRecipe) -> Split:
    """The split of ``n`` rows. Raises DataError where they do not suffice."""
    sizes = split_sizes(n, recipe)
    ids = list(range(n))
    random.Random(recipe.seed).shuffle(ids)
    return Split(
        train=tuple(ids[: sizes.train]),
        val=tuple(ids[-(sizes.val + sizes.test) : -sizes.test]),
        test=tuple(ids[-sizes.test :]),
    )
