"""The sources of the training data, one by one. Floor 0; called by what reads or checks them."""

from __future__ import annotations

from typing import Literal, NamedTuple

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


class Drawn(NamedTuple):
    """One source of a prepared folder: read how, from where, and how often each row is taken."""

    options: DatasetPreprocess
    load_path: str
    split: str | None
    weight: float = 1.0


class FolderToMake(NamedTuple):
    """A prepared folder that the section describes. `key` names it; `held`, with val_split, is
    whether it is the side held out."""

    key: str
    path: str
    held: bool | None
    sources: tuple[Drawn, ...]


def folders_of(prepare: DatasetPreprocess) -> list[FolderToMake]:
    sources = tuple(
        Drawn(part, part.load_path, part.split, weight) for part, weight in parts_of(prepare)
    )
    splits = prepare.val_split is not None
    found = [FolderToMake("save_path", prepare.save_path, False if splits else None, sources)]
    if prepare.eval_save_path:
        if splits:
            drawn = tuple(source._replace(weight=1.0) for source in sources)
        else:
            alone = prepare.model_copy(update={"datasets": []})
            path = prepare.eval_load_path or prepare.load_path
            drawn = (Drawn(alone, path, prepare.eval_split),)
        held = True if splits else None
        found.append(FolderToMake("eval_save_path", prepare.eval_save_path, held, drawn))
    return found
