"""Column headings: the name a target gets from its column's, and the unit that may stand behind it.

Of "bandgap (eV)", "shear [log10(GPa)]", "energy(eV)" and "Band gap, eV" the last part is a unit. Of "log10(K_VRH)" it
is not: what follows a word at once, or a comma, has to be a unit that is known.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_USABLE = re.compile(r"\w[\w.+-]*")
_FUNCTIONS = frozenset({"log", "log2", "log10", "ln", "lg", "sqrt"})
"""What such a word takes in brackets is its argument: of "log10(K)" K is the bulk modulus, not kelvin."""
_SYMBOLS = frozenset(
    "meV eV keV MeV Ha mHa Hartree hartree Ry mRy Rydberg mJ J kJ MJ cal kcal Pa kPa MPa GPa TPa bar mbar kbar Mbar "
    "atm K mK °C degC ° deg degree degrees rad pm nm μm um mm cm m Å A Ang Angstrom angstrom Bohr bohr mg g kg amu "
    "u Da fs ps ns μs us ms s min h Hz kHz MHz GHz THz mol mmol mV V kV A mA pC μC uC C nN mN N mW W S F T mT Oe D "
    "Debye e μB μ_B uB muB mu_B Ω Ohm ohm % ppm a.u. arb.u. 1".split()
)
_COUNTS = frozenset("atom atoms cell unit f.u. fu formula site ion electron per".split())
"""Words that make a unit with a symbol only, as in "eV per atom"."""
_ALONE = frozenset({"K", "J", "Å", "%", "°", "1"})
"""Of one character, but units: N, C and S alone are more often elements, and T, V, m or s variables."""
_LOG = re.compile(r"(?:log(?:2|10)?|ln|lg)(?:\s*\((?P<inner>.+)\)|\s+(?P<behind>.+))")
_PIECE = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:\^?[-−+]\d+|\^\d+)?|(?P<symbol>\D.*?)(?:\^?[-−+]?\d+)?")
"""A number, or a symbol and its exponent."""


def names_and_units(headings: Sequence[str]) -> list[tuple[str, str]]:
    """A name and a unit ("" without) for every heading.

    Names are made of letters, digits and _ . + - only, and those of different headings differ: where two would be the
    same, as for "gap (eV)" and "gap (Ha)", the whole heading makes the name.
    """
    found = [_split(heading.strip()) for heading in headings]
    counts = Counter(name for name, _ in found)
    kept = [counts[name] == 1 or name == heading for heading, (name, _) in zip(headings, found, strict=True)]
    taken = {name for (name, _), keep in zip(found, kept, strict=True) if keep}
    named = []
    for heading, (name, unit), keep in zip(headings, found, kept, strict=True):
        named.append((name if keep else _free(_usable(heading.strip()), taken), unit))
        taken.add(named[-1][0])
    return named


def is_unit(text: str) -> bool:
    """Whether ``text`` is a unit, also of a logarithm, as "eV/atom", "J/m^2", "log10(GPa)", "1" are."""
    text = unicodedata.normalize("NFKC", text.strip())
    if text in _SYMBOLS:
        return len(text) > 1 or text in _ALONE
    if logarithm := _LOG.fullmatch(text):
        return is_unit(logarithm["inner"] or logarithm["behind"])
    pieces = [piece for piece in re.split(r"[\s/*·⋅×()]+|\^(?=\()", text) if piece]
    found = [_PIECE.fullmatch(piece) for piece in pieces]
    symbols = [match["symbol"] for match in found if match is not None and match["symbol"] is not None]
    if None in found or not all(symbol in _SYMBOLS | _COUNTS for symbol in symbols):
        return False
    return any(symbol in _SYMBOLS for symbol in symbols) or (pieces[:1] == ["1"] and bool(symbols))


def _split(heading: str) -> tuple[str, str]:
    before, unit = _in_brackets(heading) or _behind_comma(heading) or (heading, "")
    return _usable(before) or _usable(heading) or "target", unit


def _in_brackets(heading: str) -> tuple[str, str] | None:
    """What stands before the brackets at the end, and in them, if that is a unit."""
    start = _opening(heading)
    if start < 1:
        return None
    before, unit = heading[:start], heading[start + 1 : -1].strip()
    if heading[start] == "(":
        word = re.split(r"[\W_]+", before.rstrip())[-1]
        if word.lower() in _FUNCTIONS or not (before[-1].isspace() or is_unit(unit)):
            return None
    return before, unit


def _opening(heading: str) -> int:
    """Where the bracket opens that the heading's last character closes; -1 where there is none."""
    opens = {")": "(", "]": "["}.get(heading[-1:])
    depth = 0
    for i in range(len(heading) - 1, -1, -1) if opens else ():
        depth += (heading[i] == heading[-1]) - (heading[i] == opens)
        if depth == 0:
            return i
    return -1


def _behind_comma(heading: str) -> tuple[str, str] | None:
    before, _, unit = heading.rpartition(",")
    return (before, unit.strip()) if before.strip() and is_unit(unit) else None


def _usable(text: str) -> str:
    """``text`` as a name: as it is if it can be one, or with _ for what a name cannot have; "" if nothing is left."""
    text = text.strip()
    if _USABLE.fullmatch(text):
        return text
    return re.sub(r"_{2,}", "_", re.sub(r"[^\w.+-]+", "_", text)).lstrip("_.+-").rstrip("_")


def _free(name: str, taken: set[str]) -> str:
    name = name or "target"
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free
