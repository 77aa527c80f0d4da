"""The split recipe reproduces the published splits."""

import hashlib

import pytest

from data_pipeline.errors import DataError
from data_pipeline.info import SplitRecipe, SplitSizes
from data_pipeline.splits import make_split, split_sizes


def index_hash(indices):
    """First 16 hex digits of the SHA-256 of the indices joined by newlines."""
    return hashlib.sha256("\n".join(map(str, indices)).encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("n", "recipe", "hashes"),
    [
        (
            69239,
            SplitRecipe(sizes=SplitSizes(train=60000, val=5000, test=4239)),
            ("11a8a573318b0f58", "cd6d467e62a82335", "db082dce46de3f53"),
        ),
        (55723, SplitRecipe(), ("abe205798596cde2", "76a2d21044d78d1b", "34b0b58b1d0250df")),
    ],
)
def test_published_check_values(n, recipe, hashes):
    split = make_split(n, recipe)
    assert (index_hash(split.train), index_hash(split.val), index_hash(split.test)) == hashes


def test_elastic_sizes_leave_one_row_over():
    split = make_split(1181, SplitRecipe())
    assert (len(split.train), len(split.val), len(split.test)) == (944, 118, 118)
    assert len({*split.train, *split.val, *split.test}) == 1180


@pytest.mark.parametrize(
    ("n", "ratios", "sizes"),
    [
        (90, (0.7, 0.2, 0.1), (63, 18, 9)),
        (1000, (0.29, 0.57, 0.14), (290, 570, 140)),
        (90, (0.8, 0.1, 0.1), (72, 9, 9)),
    ],
)
def test_ratios_are_the_decimals_that_were_written(n, ratios, sizes):
    found = split_sizes(n, SplitRecipe(ratios=ratios))
    assert (found.train, found.val, found.test) == sizes


def test_the_sizes_of_published_splits_are_those_of_int():
    for n in range(10, 5000):
        found = split_sizes(n, SplitRecipe())
        assert (found.train, found.val, found.test) == (int(0.8 * n), int(0.1 * n), int(0.1 * n))


def test_another_seed_is_another_split():
    assert make_split(100, SplitRecipe(seed=1)).train != make_split(100, SplitRecipe(seed=2)).train


@pytest.mark.parametrize("ratios", [(0.8, 0.2), (0.8, 0.1, 0.2), (0.9, 0.1, 0.0), (1.2, -0.1, -0.1)])
def test_bad_ratios_are_refused(ratios):
    with pytest.raises(DataError, match="ratios"):
        split_sizes(100, SplitRecipe(ratios=ratios))


def test_too_few_rows_are_refused():
    with pytest.raises(DataError, match="at least 1 row"):
        split_sizes(9, SplitRecipe())
    with pytest.raises(DataError, match="fewer than"):
        split_sizes(9, SplitRecipe(sizes=SplitSizes(train=8, val=1, test=1)))
