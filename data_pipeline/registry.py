"""The data sets known by name: the ones that ship and the ones of the paper."""

from __future__ import annotations

from data_pipeline.info import DatasetInfo, RemoteFile, SourceKind, SplitRecipe, SplitSizes, TargetInfo

MATMINER = "matminer 0.4.0 source distribution on PyPI, matminer/datasets/"
MP_LICENCE = "CC BY 4.0 (Materials Project)"
FIGSHARE = "https://ndownloader.figshare.com/files/"
JARVIS_LICENCE = "see the figshare record; JARVIS data are a work of the US government (NIST)"

_SHEAR = TargetInfo(
    name="shear",
    unit="log10(GPa)",
    description="decimal logarithm of the shear modulus, Voigt-Reuss-Hill average",
    column="G_VRH",
    aliases=("shear_modulus",),
)
_BULK = TargetInfo(
    name="bulk",
    unit="log10(GPa)",
    description="decimal logarithm of the bulk modulus, Voigt-Reuss-Hill average",
    column="K_VRH",
    aliases=("bulk_modulus",),
)

_EMBEDDED = (
    DatasetInfo(
        name="elastic_tensor_2015",
        kind=SourceKind.EMBEDDED,
        targets=(_SHEAR, _BULK),
        source=MATMINER + "elastic_tensor.csv",
        citation="de Jong et al., Charting the complete elastic properties of inorganic crystalline compounds, "
        "Sci. Data 2, 150009 (2015), doi:10.1038/sdata.2015.9",
        licence=MP_LICENCE,
        expected=SplitSizes(train=944, val=118, test=118),
    ),
    DatasetInfo(
        name="flla_2015",
        kind=SourceKind.EMBEDDED,
        targets=(
            TargetInfo(
                name="e_form",
                unit="eV/atom",
                description="formation energy",
                column="formation_energy_per_atom",
            ),
            TargetInfo(
                name="ehull", unit="eV/atom", description="energy above the convex hull", column="e_above_hull"
            ),
        ),
        source=MATMINER + "flla_2015.csv",
        citation="Faber et al., Crystal structure representations for machine learning models of formation energies, "
        "Int. J. Quantum Chem. 115, 1094 (2015), doi:10.1002/qua.24917",
        licence=MP_LICENCE,
        expected=SplitSizes(train=3150, val=393, test=393),
    ),
    DatasetInfo(
        name="dielectric_2017",
        kind=SourceKind.EMBEDDED,
        targets=(
            TargetInfo(name="bandgap", unit="eV", description="band gap, PBE", column="band_gap"),
            TargetInfo(name="n", unit="1", description="refractive index", column="n"),
        ),
        source=MATMINER + "dielectric_constant.csv",
        citation="Petousis et al., High-throughput screening of inorganic compounds for the discovery of novel "
        "dielectric and optical materials, Sci. Data 4, 160134 (2017), doi:10.1038/sdata.2016.134",
        licence=MP_LICENCE,
        expected=SplitSizes(train=844, val=105, test=105),
    ),
)


def _jarvis(
    name: str,
    file: RemoteFile,
    id_field: str,
    targets: tuple[TargetInfo, ...],
    expected: SplitSizes,
    recipe: SplitRecipe = SplitRecipe(),  # noqa: B008 - frozen
) -> DatasetInfo:
    return DatasetInfo(
        name="jarvis__" + name,
        kind=SourceKind.JARVIS,
        targets=targets,
        source=f"jarvis-tools figshare set, {file.url}",
        citation=_CITATIONS[file.name],
        licence=JARVIS_LICENCE,
        files=(file,),
        id_field=id_field,
        recipe=recipe,
        expected=expected,
        ends=_ENDS["jarvis__" + name],
        aliases=(name,),
    )


_MEGNET = RemoteFile(url=FIGSHARE + "26724977", name="megnet.json.zip")
_DFT_3D = RemoteFile(url=FIGSHARE + "29204826", name="jdft_3d-8-18-2021.json.zip")
_OQMD = RemoteFile(url=FIGSHARE + "26790182", name="all_oqmd.json.zip")
_ELASTIC_ENDS = (("mp-10000", "mp-715469"), ("mp-10015", "mp-867194"), ("mp-1001019", "mp-704419"))
_ENDS = {
    "jarvis__megnet": (("mp-569112", "mvc-6917"), ("mp-558851", "mp-542332"), ("mp-554286", "mp-17481")),
    "jarvis__megnet-shear": _ELASTIC_ENDS,
    "jarvis__megnet-bulk": _ELASTIC_ENDS,
    "jarvis__dft_3d_2021": (
        ("JVASP-21450", "JVASP-28366"),
        ("JVASP-68836", "JVASP-5650"),
        ("JVASP-38636", "JVASP-90134"),
    ),
    "jarvis__dft_3d_2021-ehull": (
        ("JVASP-33661", "JVASP-14073"),
        ("JVASP-101868", "JVASP-118132"),
        ("JVASP-8413", "JVASP-90134"),
    ),
    "jarvis__dft_3d_2021-mbj_bandgap": (
        ("JVASP-11762", "JVASP-12820"),
        ("JVASP-59652", "JVASP-10869"),
        ("JVASP-100464", "JVASP-65765"),
    ),
    "jarvis__oqmd_3d": (("838046", "368371"), ("897017", "764365"), ("820496", "452980")),
    "jarvis__oqmd_3d-bandgap": (("307903", "932283"), ("719433", "989134"), ("506427", "452988")),
}
"""Ids of the first and last row of train, val and test, as the authors' program data/check_datasets.py pins them."""
_CITATIONS = {
    _MEGNET.name: "Chen et al., Graph networks as a universal machine learning framework for molecules and crystals, "
    "Chem. Mater. 31, 3564 (2019), doi:10.1021/acs.chemmater.9b01294",
    _DFT_3D.name: "Choudhary et al., The joint automated repository for various integrated simulations (JARVIS) for "
    "data-driven materials design, npj Comput. Mater. 6, 173 (2020), doi:10.1038/s41524-020-00440-1",
    _OQMD.name: "Kirklin et al., The Open Quantum Materials Database (OQMD), npj Comput. Mater. 1, 15010 (2015), "
    "doi:10.1038/npjcompumats.2015.10",
}


def _target(name: str, unit: str, description: str, column: str) -> TargetInfo:
    return TargetInfo(name=name, unit=unit, description=description, column=column)


_PAPER = (
    _jarvis(
        "megnet",
        _MEGNET,
        "id",
        (
            _target("e_form", "eV/atom", "formation energy", "e_form"),
            _target("bandgap", "eV", "band gap, PBE", "gap pbe"),
        ),
        SplitSizes(train=60000, val=5000, test=4239),
        SplitRecipe(sizes=SplitSizes(train=60000, val=5000, test=4239)),
    ),
    _jarvis(
        "dft_3d_2021",
        _DFT_3D,
        "jid",
        (
            _target("formation_energy", "eV/atom", "formation energy", "formation_energy_peratom"),
            _target("total_energy", "eV/atom", "total energy, OptB88vdW", "optb88vdw_total_energy"),
            _target("opt_bandgap", "eV", "band gap, OptB88vdW", "optb88vdw_bandgap"),
        ),
        SplitSizes(train=44578, val=5572, test=5572),
    ),
    _jarvis(
        "dft_3d_2021-mbj_bandgap",
        _DFT_3D,
        "jid",
        (_target("mbj_bandgap", "eV", "band gap, Tran-Blaha modified Becke-Johnson", "mbj_bandgap"),),
        SplitSizes(train=14537, val=1817, test=1817),
    ),
    _jarvis(
        "dft_3d_2021-ehull",
        _DFT_3D,
        "jid",
        (_target("ehull", "eV", "energy above the convex hull", "ehull"),),
        SplitSizes(train=44296, val=5537, test=5537),
    ),
    _jarvis(
        "oqmd_3d",
        _OQMD,
        "_oqmd_entry_id",
        (
            _target("stability", "eV/atom", "distance to the convex hull, OQMD", "_oqmd_stability"),
            _target("delta_e", "eV/atom", "formation energy, OQMD", "_oqmd_delta_e"),
        ),
        SplitSizes(train=654108, val=81763, test=81763),
    ),
    _jarvis(
        "oqmd_3d-bandgap",
        _OQMD,
        "_oqmd_entry_id",
        (_target("bandgap", "eV", "band gap, OQMD", "_oqmd_band_gap"),),
        SplitSizes(train=653388, val=81673, test=81673),
    ),
)


def _matformer(
    short: str, target: TargetInfo, column: str, ids: tuple[int, int, int], sizes: SplitSizes
) -> DatasetInfo:
    files = tuple(
        RemoteFile(url=f"{FIGSHARE}{number}", name=f"{short}_megnet_{split}.pkl", split=split)
        for number, split in zip(ids, ("train", "val", "test"), strict=True)
    )
    return DatasetInfo(
        name=f"jarvis__megnet-{short}",
        kind=SourceKind.MATFORMER,
        targets=(
            TargetInfo(
                name=target.name,
                unit=target.unit,
                description=target.description,
                column=column,
                aliases=target.aliases,
            ),
        ),
        source="Matformer's figshare project 165430, files " + ", ".join(str(number) for number in ids),
        citation="Yan et al., Periodic graph transformers for crystal material property prediction, NeurIPS 2022; "
        "data of the Materials Project",
        licence=MP_LICENCE,
        files=files,
        id_field="id",
        expected=sizes,
        ends=_ENDS[f"jarvis__megnet-{short}"],
        aliases=(f"megnet-{short}", f"jarvis__megnet-{short}_modulus"),
    )


_ELASTIC = (
    _matformer(
        "bulk", _BULK, "bulk modulus", (40258705, 40258675, 40258666), SplitSizes(train=4664, val=393, test=393)
    ),
    _matformer(
        "shear", _SHEAR, "shear modulus", (40258681, 40258684, 40258678), SplitSizes(train=4664, val=392, test=393)
    ),
)

DATASETS: tuple[DatasetInfo, ...] = (*_EMBEDDED, *_PAPER[:1], *_ELASTIC, *_PAPER[1:])
"""Every registered set, the embedded ones first."""
