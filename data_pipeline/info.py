"""What is known of a data set before any of it is read: targets, source, split recipe, citation, licence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetInfo:
    """A property to predict.

    name: the column and the command line's --target. unit: of the stored values, with the base of a logarithm.
    aliases: other spellings accepted from users. column: the source's own name of the field.
    """

    name: str
    unit: str
    description: str
    column: str = ""
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSizes:
    """Structures in the three splits."""

    train: int
    val: int
    test: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitRecipe:
    """How rows are dealt to splits (splits.py): by explicit sizes if given, else by ratios of the usable rows."""

    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    sizes: SplitSizes | None = None
    seed: int = 123


class SourceKind(StrEnum):
    """Where the structures of a data set come from."""

    EMBEDDED = "embedded"
    JARVIS = "jarvis"
    MATFORMER = "matformer"
    OWN = "own"


@dataclass(frozen=True, kw_only=True, slots=True)
class RemoteFile:
    """One file to download. split: the split all its rows belong to, empty where the recipe decides.

    sha256: its published digest, empty where none is published.
    """

    url: str
    name: str
    split: str = ""
    sha256: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetInfo:
    """A data set by name.

    expected: published split sizes; None where none are published. ends: published ids of the first and last row of
    train, val and test, in the recipe's order. Both are checked when the set is prepared.
    """

    name: str
    kind: SourceKind
    targets: tuple[TargetInfo, ...]
    source: str
    citation: str
    licence: str
    files: tuple[RemoteFile, ...] = ()
    id_field: str = "material_id"
    recipe: SplitRecipe = SplitRecipe()
    expected: SplitSizes | None = None
    ends: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def target_names(self) -> tuple[str, ...]:
        """Canonical names of the targets, in order."""
        return tuple(target.name for target in self.targets)

    def find_target(self, name: str) -> TargetInfo | None:
        """The target called ``name`` or having it as an alias."""
        return next((t for t in self.targets if name == t.name or name in t.aliases), None)
