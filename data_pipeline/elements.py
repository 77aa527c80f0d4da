"""Chemical symbols, so that nothing heavy is imported to name an element."""

from __future__ import annotations

SYMBOLS: tuple[str, ...] = tuple(
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y Zr Nb "
    "Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au "
    "Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv "
    "Ts Og".split()
)
"""Symbols of the elements 1 to 118; the model knows those to 98 (validate.MAX_ATOMIC_NUMBER)."""

_NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS, start=1)} | {"D": 1, "T": 1}


def symbol_of(number: int) -> str:
    """The symbol of atomic number 1 to 118."""
    return SYMBOLS[number - 1]


def number_of(symbol: str) -> int:
    """The atomic number of a symbol; deuterium and tritium are hydrogen. Raises ValueError if there is no such."""
    number = _NUMBERS.get(symbol)
    if number is None:
        raise ValueError(f"unknown element {symbol!r:.20}")
    return number
