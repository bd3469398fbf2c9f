"""`vectorlm data inspect`: rows of a prepared folder as a person would read them, and what the
folder as a whole is like. Floor 4; starts without torch or transformers.

What is learned is green on a terminal, and stands between [[ and ]] elsewhere.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vectorlm.config.load import load_config, required_section
from vectorlm.config.schema import Config
from vectorlm.data.store import open_rows
from vectorlm.data.tokenize import load_tokenizer
from vectorlm.errors import EXIT_OK
from vectorlm.hub_cache import find_model_folder
from vectorlm.manifest import Manifest, read_manifest, refuse_other_tokenizer
from vectorlm.recipe import changed_since
from vectorlm.row import Row
from vectorlm.tokenizer_files import FAST, tokenizer_file_sha256

BAR = 40
GREEN, DIM, PLAIN = "\033[32m", "\033[2m", "\033[0m"
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def inspect(config_path: str, overrides: Sequence[str], rows: int, folder: str | None) -> int:
    config = load_config(config_path, overrides)
    path = folder or _folder(config, config_path)
    manifest, table = read_manifest(path), open_rows(path)
    _refuse_other_tokenizer(config.model, Path(path), manifest)
    reader = Reader(load_backend(config.model), sys.stdout)
    changed = "; ".join(changed_since(config, path, manifest))
    if changed:
        print(f"Prepared otherwise than {config_path} says now: {changed}\n")
    print(overview(path, manifest))
    cut = manifest.cut_documents
    print(histogram(document_lengths(table), "pieces of documents" if cut else "documents"))
    if cut:
        print(f"  {cut:,} documents were cut: one that is shown may be a piece")
    for number in evenly(table.num_rows, rows):
        print()
        print("\n".join(reader.lines(number, row_of(table, number))))
    return EXIT_OK


def _folder(config: Config, config_path: str) -> str:
    if config.dataset is not None:
        return config.dataset.train_ds
    return required_section(config, "dataset_preprocess", config_path).save_path


def load_backend(model: str) -> Any:
    """The `tokenizers` backend; from tokenizer.json, where the model has one."""
    from tokenizers import Tokenizer

    folder = find_model_folder(model)
    if folder is not None and (folder / FAST).is_file():
        try:
            return Tokenizer.from_file(str(folder / FAST))
        except Exception:  # the Rust library raises nothing more special
            pass  # whoever loads it whole says what is wrong
    tokenizer = load_tokenizer(model)
    return tokenizer.slow or tokenizer.backend


def _refuse_other_tokenizer(model: str, path: Path, manifest: Manifest) -> None:
    """By the file alone where that is enough: transformers may take seconds to load."""
    folder = find_model_folder(model)
    now = tokenizer_file_sha256(folder) if folder else None
    if now is None or now != manifest.tokenizer_file_sha256:
        refuse_other_tokenizer(path, manifest, load_tokenizer(model).sha256, model)


# --- the folder -----------------------------------------------------------------------------------


def overview(path: str, made: Manifest) -> str:
    share = made.supervised_tokens / max(made.tokens, 1)
    lines = [
        f"{path}: {made.rows:,} rows of at most {made.max_seq_len:,} tokens, {made.fill:.1%} full",
        f"  documents  {made.documents:,}",
        f"  tokens     {made.tokens:,}; {made.supervised_tokens:,} of them learned ({share:.1%})",
    ]
    if made.skipped:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in made.skipped.items())
        lines.append(f"  skipped    {skipped}")
    return "\n".join(lines)


def document_lengths(table: pa.Table) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of every document, or of each piece of one that was cut."""
    parts = [np.empty(0, np.int64)]
    for batch in table.select(["input_ids", "boundaries"]).to_batches():
        lengths = pc.list_value_length(batch.column(0)).to_numpy(zero_copy_only=False)
        counts = pc.list_value_length(batch.column(1)).to_numpy(zero_copy_only=False)
        starts = batch.column(1).flatten().to_numpy().astype(np.int64)
        ends = np.append(starts[1:], 0)
        ends[np.cumsum(counts) - 1] = lengths
        parts.append(ends - starts)
    return np.concatenate(parts)


def histogram(lengths: np.ndarray[Any, np.dtype[np.int64]], what: str = "documents") -> str:
    """By powers of two, one line each from the shortest to the longest."""
    counts = np.bincount(np.frexp(lengths)[1])
    first = int(np.flatnonzero(counts)[0])
    lines = [f"  {what} by length (median {int(np.median(lengths)):,} tokens)"]
    for power in range(first, len(counts)):
        low, high = 1 << (power - 1), (1 << power) - 1
        bar = "#" * round(BAR * counts[power] / counts.max())
        lines.append(f"  {low:>9,} - {high:>9,} {counts[power]:>12,} {bar}".rstrip())
    return "\n".join(lines)


# --- rows -----------------------------------------------------------------------------------------


def evenly(total: int, wanted: int) -> list[int]:
    """Numbers of rows from all over the folder."""
    shown = min(total, wanted)
    return [at * total // shown for at in range(shown)]


def row_of(table: pa.Table, number: int) -> Row:
    values = table.slice(number, 1).to_pylist()[0]
    return Row(
        *(np.array(values[name], np.int32) for name in ("input_ids", "labels", "boundaries"))
    )


class Reader:
    """Writes rows for a person, in colour where that can be seen."""

    def __init__(self, backend: Any, out: TextIO) -> None:
        self.backend = backend
        colour = out.isatty() and "NO_COLOR" not in os.environ
        self.marks = {
            True: (GREEN, PLAIN) if colour else ("[[", "]]"),
            False: (DIM, PLAIN) if colour else ("", ""),
        }

    def lines(self, number: int, row: Row) -> Iterator[str]:
        edges = [*row.boundaries.tolist(), len(row.input_ids)]
        learned = row.labels >= 0
        head = f"row {number:,}: {len(row.input_ids):,} tokens, {int(learned.sum()):,} learned"
        yield f"=== {head}, documents: {len(edges) - 1}"
        for place, (start, end) in enumerate(pairwise(edges), start=1):
            yield f"--- document {place}: tokens {start:,} to {end - 1:,}"
            yield self.text(row.input_ids[start:end].tolist(), learned[start:end].tolist())

    def text(self, ids: list[int], learned: list[bool]) -> str:
        """Cut where learning begins or ends: decoded from the start each time, as how a token
        reads depends on those before it."""
        shown, before, end = "", "", 0
        for is_learned, group in groupby(learned):
            end += len(list(group))
            text = self.backend.decode(ids[:end], skip_special_tokens=False)
            opening, closing = self.marks[is_learned]
            shown += opening + visible(text[len(before) :]) + closing
            before = text
        return shown


def visible(text: str) -> str:
    """What would steer the terminal is shown instead."""
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
