"""Memory that is used again: never while anybody has it, and no more of it than a step needs."""

import numpy as np

from crystalformer.ops.numba.memory import LARGE, MOST_FREE, Pieces


def address(array: np.ndarray) -> int:
    return array.ctypes.data


def test_pieces_begin_with_a_line_of_the_cache():
    pieces = Pieces()
    for count in (1, 17, LARGE - 1, LARGE, LARGE + 3):
        piece = pieces.take(count)
        assert piece.shape == (count,) and piece.dtype == np.float32 and address(piece) % 64 == 0
        piece[:] = 1.0


def test_a_large_piece_is_used_again_once_no_view_of_it_is_left():
    pieces = Pieces()
    piece = pieces.take(LARGE)
    piece[-1] = 7.0
    at, view = address(piece), piece[LARGE // 2 :].reshape(2, -1)[1]
    del piece
    other = pieces.take(LARGE)
    assert address(other) != at and view[-1] == 7.0
    del view
    assert address(pieces.take(LARGE)) == at


def test_the_smallest_piece_that_is_large_enough_is_taken():
    pieces = Pieces()
    small, large = pieces.take(LARGE), pieces.take(2 * LARGE)
    places = address(small), address(large)
    del small, large
    again = pieces.take(LARGE - 1), pieces.take(LARGE), pieces.take(LARGE + 1)
    assert tuple(map(address, again[1:])) == places


def test_no_more_is_kept_than_a_step_needs_and_nothing_that_is_too_small():
    pieces = Pieces()
    held = [pieces.take(LARGE + 64 * more) for more in range(MOST_FREE + 2)]
    largest = {address(piece) for piece in held[-MOST_FREE:]}
    held.clear()
    again = [pieces.take(LARGE) for _ in range(MOST_FREE + 1)]
    assert {address(piece) for piece in again[:MOST_FREE]} == largest and address(again[-1]) not in largest
    again.clear()
    grown = pieces.take(2 * LARGE)  # the others are let go of before it is asked for
    assert len(grown) == 2 * LARGE and address(grown) not in largest
    assert pieces._free == []
