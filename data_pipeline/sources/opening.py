"""From what is registered under a name to the source that reads it."""

from __future__ import annotations

from data_pipeline.errors import DataError
from data_pipeline.info import DatasetInfo, SourceKind
from data_pipeline.sources.base import Source
from data_pipeline.sources.embedded import EmbeddedSource


def open_registered(info: DatasetInfo) -> Source:
    """The source of a registered data set. Raises DataError where there is none."""
    if info.kind is SourceKind.EMBEDDED:
        return EmbeddedSource(info)
    raise DataError(f"data set {info.name}: sources of kind {info.kind} are read only once prepared")
