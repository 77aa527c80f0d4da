"""What of a column's heading is the target's name, and what its unit."""

import pytest

from data_pipeline.sources.headings import is_unit, names_and_units


@pytest.mark.parametrize(
    ("heading", "name", "unit"),
    [
        ("bandgap (eV)", "bandgap", "eV"),
        ("shear [log10(GPa)]", "shear", "log10(GPa)"),
        ("formation energy", "formation_energy", ""),
        ("n", "n", ""),
        ("_oqmd_band_gap", "_oqmd_band_gap", ""),
        ("log10(K_VRH)", "log10_K_VRH", ""),
        ("log10(K)", "log10_K", ""),
        ("log10 (K)", "log10_K", ""),
        ("log10(K_VRH) (log10(GPa))", "log10_K_VRH", "log10(GPa)"),
        ("Band gap, eV", "Band_gap", "eV"),
        ("K, log10(GPa)", "K", "log10(GPa)"),
        ("modulus, Voigt", "modulus_Voigt", ""),
        ("energy, total (eV)", "energy_total", "eV"),
        ("energy(eV)", "energy", "eV"),
        ("energy(eV/atom)", "energy", "eV/atom"),
        ("Tc(K)", "Tc", "K"),
        ("x[GPa]", "x", "GPa"),
        ("gap (DFT) (eV)", "gap_DFT", "eV"),
        ("frac(N)", "frac_N", ""),
        ("C(1,1)", "C_1_1", ""),
        ("α (10⁻⁶/K)", "α", "10⁻⁶/K"),
        ("gap (eV", "gap_eV", ""),
        ("a / b", "a_b", ""),
        ("-x", "x", ""),
        ("%", "target", ""),
    ],
)
def test_name_and_unit(heading, name, unit):
    assert names_and_units([heading]) == [(name, unit)]


def test_names_of_different_headings_differ():
    headings = ["log10(K_VRH)", "log10(G_VRH)", "gap (eV)", "gap (Ha)", "gap", "a b", "a_b", "a, b"]
    names = [name for name, _ in names_and_units(headings)]
    assert names == ["log10_K_VRH", "log10_G_VRH", "gap_eV", "gap_Ha", "gap", "a_b_2", "a_b", "a_b_3"]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "eV",
            "meV",
            "eV/atom",
            "GPa",
            "Å",
            "\u212b",
            "K",
            "J",
            "J/m^2",
            "1",
            "%",
            "log10(GPa)",
            "log GPa",
            "Å^3/atom",
        ),
        *("W/(m K)", "10^-6/K", "1/K", "g/cm3", "cm^-1", "eV per atom", "kJ/mol", "μB/f.u.", "m²", "a.u."),
    ],
)
def test_units(text):
    assert is_unit(text)


@pytest.mark.parametrize(
    "text", ["", "K_VRH", "N", "V", "1,1", "2", "DFT", "atom", "per", "log10(K_VRH)", "eV/foo", "^"]
)
def test_no_units(text):
    assert not is_unit(text)
