"""The manifest of a prepared folder: what it holds and what it was made from. Floor 1; written by
`vectorlm.data.store`, read by it and by `check`. docs/decisions.md, section 2, has the format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vectorlm.errors import DataError

FORMAT = 1
MANIFEST_NAME = "manifest.json"
REFUSED_NAME = "refused.jsonl"  # beside it, where rows were refused


class SourceCounts(BaseModel):
    """What one source gave, before packing. Rows are counted once; documents and tokens each time
    that they are taken."""

    model_config = ConfigDict(extra="forbid", strict=True)

    load_path: str
    weight: float
    bytes: int = 0  # of its files
    rows: int = 0
    refused: int = 0
    too_long: int = 0
    held_out: int = 0
    documents: int = 0
    tokens: int = 0
    supervised_tokens: int = 0


# What says nothing about the rows themselves: data with other notes is the same data.
NOTES = ("cut_documents", "sources")


class Manifest(BaseModel):
    """`manifest.json`: what the folder holds and what it was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int
    max_seq_len: int
    ignore_index: int
    rows: int
    documents: int
    tokens: int
    supervised_tokens: int
    fill: float
    longest_row: int
    max_token_id: int
    skipped: dict[str, int]
    tokenizer_sha256: str
    # Of tokenizer.json alone: what can be compared where transformers takes too long to load.
    tokenizer_file_sha256: str | None = None
    source_sha256: str
    options: dict[str, Any]
    options_sha256: str
    # Documents of which a part stands apart from another, or was left out.
    cut_documents: int | None = None
    sources: list[SourceCounts] = []

    def fingerprint(self) -> str:
        """Identifies the prepared rows, whatever their sources are called."""
        content = self.model_dump_json(indent=2, exclude=set(NOTES), exclude_unset=True) + "\n"
        return hashlib.sha256(content.encode()).hexdigest()


def options_sha256(options: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of a prepared folder; a DataError says what is wrong and how to prepare it."""
    path = Path(folder) / MANIFEST_NAME
    cure = "Prepare it with: vectorlm preprocess --config <your config.yaml>"
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: there is no such folder of prepared data.\n{cure}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: no {MANIFEST_NAME}, so this is no prepared data.\n{cure}"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}).\nDelete {path.parent} and prepare it anew."
        ) from error
    return parse_manifest(path, content)


def refuse_other_tokenizer(folder: Path, manifest: Manifest, sha256: str, model: str) -> None:
    if manifest.tokenizer_sha256 != sha256:
        raise DataError(
            f"{folder}: was prepared with another tokenizer than that of {model}; "
            "prepare it again: vectorlm preprocess --config ..."
        )


def parse_manifest(path: Path, content: Any) -> Manifest:
    number = content.get("format") if isinstance(content, dict) else None
    if isinstance(number, int) and number > FORMAT:
        raise DataError(
            f"{path}: written in format {number} by a newer VectorLM; this one reads up to "
            f"format {FORMAT}.\n"
            "Update VectorLM, or prepare the data into another folder."
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise DataError(
            f"{path}: broken: {field}: {first['msg']}.\nDelete {path.parent} and prepare it anew."
        ) from error
