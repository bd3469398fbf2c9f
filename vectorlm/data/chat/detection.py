"""What the rows of a source are: as the configuration says, or by the names of their columns.
Floor 2; called by `vectorlm.preprocess`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from vectorlm.chat.formats import COLUMNAR, FORMATS, column_names, detect
from vectorlm.config.schema import DatasetPreprocess
from vectorlm.data.sources import Source

LOOKED_AT = 20


class RowsAre(NamedTuple):
    """`columns`: those to read, None for all; `reason` says why it is this format."""

    row_format: str
    columns: tuple[str, ...] | None
    reason: str

    @property
    def is_text(self) -> bool:
        return self.row_format == "text"


def look_at_rows(source: Source, options: DatasetPreprocess) -> RowsAre:
    if source.kind == "text" or options.row_format == "text":
        return RowsAre("text", None, "")
    present = first_columns(source)
    given = options.row_format
    found = given or detect(present, options.columns, options.data_field)
    if found is None or found == "text":
        # With no column that is known, too: the first row then says what is absent.
        return RowsAre("text", None, others(present, options))
    names = column_names(found, options.columns)
    has_all = all(names[role] in present for role in FORMATS[found].required)
    listed = ", ".join(name for name in names.values() if name in present)
    return RowsAre(
        found,
        tuple(names.values()) if has_all and source.kind in COLUMNAR else None,
        f"dataset_format: {given}" if given else f"by its columns {listed}",
    )


def others(present: list[str], options: DatasetPreprocess) -> str:
    """Conversations beside a field of texts are easily overlooked."""
    left = [name for name in present if name != options.data_field]
    also = detect(left, options.columns, options.data_field)
    if options.data_field not in present or also is None:
        return ""
    return (
        f"the field '{options.data_field}' is read; for the columns of {also} beside it, set "
        f"dataset_preprocess.dataset_format: {also}"
    )


def first_columns(source: Source) -> list[str]:
    """The columns of the first rows, in order."""
    for batch in source.batches():
        if batch.values:
            rows: list[Any] = batch.values[:LOOKED_AT]
            return list(dict.fromkeys(name for row in rows for name in row))
    return []
