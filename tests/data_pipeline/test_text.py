"""Text that files can hold and terminals can show."""

import sys
import unicodedata

import pytest

from data_pipeline.text import printable, printable_lines, readable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Å³ é 硬度 😀 \\x1b 'a'\u00a0b", "Å³ é 硬度 😀 \\x1b 'a'\u00a0b"),
        ("m1\x1b[2J\x1b]0;owned\x07\nerror: forged", r"m1\x1b[2J\x1b]0;owned\x07\nerror: forged"),
        ("a\r\tb\x00\x7f\x9b", r"a\r\tb\x00\x7f\x9b"),
        ("a\u202eb\u200b\ufeff\U000e0041", r"a\u202eb\u200b\ufeff\U000e0041"),
        ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),
        ("a\udcff\ue000", r"a\udcff\ue000"),
    ],
    ids=["as it is", "escapes", "controls", "formatting", "line ends", "others"],
)
def test_what_cannot_be_seen_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown == printable(shown)
    assert readable(shown) == shown


def test_no_character_of_an_other_category_is_left():
    whole = "".join(map(chr, range(sys.maxunicode + 1)))
    assert not [char for char in printable(whole) if unicodedata.category(char)[0] == "C"]
    assert len(printable(whole).splitlines()) == 1


def test_lines_stay_lines():
    assert printable_lines("a\x1b\n\nb\r\n") == "a\\x1b\n\nb\\r\n"
