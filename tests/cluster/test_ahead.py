"""Items made ahead: in order, one at a time, errors and ends where they belong."""

import threading

import pytest

from cluster.ahead import ahead


def test_all_come_in_their_order_even_none():
    assert list(ahead([3, None, 1])) == [3, None, 1]
    assert list(ahead([])) == []


def test_the_next_one_is_made_while_one_is_worked_on_and_no_more():
    begun = [threading.Event() for _ in range(4)]

    def made():
        for number, event in enumerate(begun):
            event.set()
            yield number

    coming = ahead(made())
    for number in coming:
        assert begun[min(number + 1, 3)].wait(10)
        assert not any(event.is_set() for event in begun[number + 2 :])


def test_an_error_comes_where_its_item_would_have_come():
    def made():
        yield 1
        raise OSError("disk")

    coming = ahead(made())
    assert next(coming) == 1
    with pytest.raises(OSError, match="disk"):
        next(coming)


def test_one_that_is_left_early_leaves_no_thread():
    before = threading.active_count()
    coming = ahead(range(10))
    assert next(coming) == 0
    coming.close()
    assert threading.active_count() == before
