"""The sources of the training data, one by one. Floor 0; called by what reads or checks them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vectorlm.config.schema import DatasetPreprocess, Section, SourceFormat


class DatasetSource(Section):
    """One entry of `dataset_preprocess.datasets`."""

    load_path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0)
    split: str | None = None
    dataset_format: SourceFormat = "auto"
    from_disk: bool = False
    data_field: str = Field("text", min_length=1)
    columns: dict[str, str] = Field({})
    text_rows: Literal["line", "paragraph", "file"] = "line"


def parts_of(prepare: DatasetPreprocess) -> list[tuple[DatasetPreprocess, float]]:
    """Each of `datasets` as if it stood in the section alone, and its weight."""
    if not prepare.datasets:
        return [(prepare, 1.0)]
    found = []
    for entry in prepare.datasets:
        one = DatasetSource.model_validate(entry)
        own = one.model_dump(exclude={"weight"}) | {"datasets": []}
        found.append((prepare.model_copy(update=own), one.weight))
    return found
