"""What became of the rows of each source, and a list of those that were refused. Floor 2; kept by
`vectorlm.preprocess` while a folder is made.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from vectorlm.chat.problem import OF_THE_TEMPLATE
from vectorlm.data.documents import TOO_LONG, Documents
from vectorlm.data.workplace import explained
from vectorlm.errors import DataError
from vectorlm.files import sync
from vectorlm.manifest import REFUSED_NAME, SourceCounts
from vectorlm.row_batch import BadRow, RowBatch

MOST_LISTED = 100_000
OTHER_TEMPLATE = (
    "Name another template with dataset_preprocess.chat_template, such as configs/chatml.jinja, "
    "mend the row"
)


class Refused:
    """Stops at the first bad row, or counts them by reason, keeps one of each to show, and lists
    them in a file of the folder that is being made."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.counts: Counter[str] = Counter()
        self.shown: dict[str, str] = {}
        self.folder = Path()
        self.file: IO[bytes] | None = None

    def open(self, folder: Path, size: int = 0) -> None:
        """`size`: what an interrupted run had written when it recorded how far it was."""
        self.folder = folder
        if size:
            self.file = (folder / REFUSED_NAME).open("r+b")
            self.file.truncate(size)
            self.file.seek(size)

    def add(self, bad_rows: Iterable[BadRow]) -> None:
        for bad in bad_rows:
            if not self.skip and bad.reason != TOO_LONG:
                raise DataError(
                    f"{bad.where}: {bad.detail}.\n"
                    f"{OTHER_TEMPLATE if bad.reason in OF_THE_TEMPLATE else 'Mend the row'}, "
                    "or set dataset_preprocess.skip_bad_rows: true to skip and count such rows."
                )
            if self.counts.total() < MOST_LISTED:
                self.write(bad)
            self.counts[bad.reason] += 1
            self.shown.setdefault(bad.reason, f"{bad.where}: {bad.detail}")

    def write(self, bad: BadRow) -> None:
        source, _, place = bad.where.rpartition(":")
        unit = "row" if place.startswith(" row ") else "line"
        entry = {"source": source, unit: int(place.removeprefix(" row "))}
        entry |= {"reason": bad.reason, "detail": bad.detail}
        with explained(self.folder):
            if self.file is None:
                path = self.folder / REFUSED_NAME
                self.file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb")
            self.file.write(json.dumps(entry).encode() + b"\n")

    def __enter__(self) -> Refused:
        return self

    def __exit__(self, *_: object) -> None:
        # Also after a full disk, when closing fails again.
        with suppress(DataError):
            self.close()

    def close(self) -> None:
        file, self.file = self.file, None
        if file:
            with explained(self.folder), file:
                sync(file)

    def written(self) -> int:
        """How much of it is safely there."""
        if self.file is None:
            return 0
        with explained(self.folder):
            sync(self.file)
        return self.file.tell()

    def state(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "shown": self.shown, "size": self.written()}

    def load_state(self, state: Mapping[str, Any], folder: Path) -> None:
        self.counts, self.shown = Counter(state["counts"]), dict(state["shown"])
        self.open(folder, state["size"])


class Account:
    """Source by source; numbers only, as the manifest has them."""

    def __init__(self, sources: Sequence[SourceCounts], ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.sources = list(sources)

    def add(self, batch: RowBatch, made: Documents, bad: int, long: int) -> None:
        """`bad` rows are those of the batch and those that made no document."""
        counts = self.sources[batch.source]
        if not batch.again:
            read = len(batch.values) + len(batch.bad)
            counts.rows += read + batch.held_out + batch.passed_over
            counts.refused += bad
            counts.too_long += long
            counts.held_out += batch.held_out
        counts.documents += len(made.offsets) - 1
        counts.tokens += len(made.ids)
        counts.supervised_tokens += int(np.count_nonzero(made.labels != self.ignore_index))

    def state(self) -> list[dict[str, Any]]:
        return [one.model_dump() for one in self.sources]

    def load_state(self, state: Iterable[Mapping[str, Any]]) -> None:
        self.sources = [SourceCounts.model_validate(one) for one in state]

    def lines(self) -> list[str]:
        """A line for each of several sources; of one, the whole folder's counts say it all."""
        if len(self.sources) == 1 and self.sources[0].weight == 1 and not self.sources[0].held_out:
            return []
        return [line for one in self.sources for line in told(one)]

    def unused(self) -> list[str]:
        return [
            f"warning: {one.load_path} gives nothing: of its {one.rows:,} rows, weight "
            f"{one.weight:g} takes none"
            for one in self.sources
            if one.weight < 1 and one.rows > one.refused + one.held_out and not one.documents
        ]


def told(one: SourceCounts) -> list[str]:
    apart = {"refused": one.refused, "too long": one.too_long, "held out": one.held_out}
    facts = [f"{count:,} {what}" for what, count in apart.items() if count]
    facts.append(f"{one.documents:,} documents")
    facts.append(f"{one.tokens:,} tokens, {one.supervised_tokens:,} learned")
    lines = [f"    {one.load_path}: {one.rows:,} rows read; {'; '.join(facts)}"]
    if one.weight < 1:
        share = f"{100 * one.weight:g} % of its rows, once an epoch"
        lines.append(f"      weight {one.weight:g}: {share}")
    elif one.weight > 1:
        on_average = "" if one.weight.is_integer() else ", on average"
        times = f"each row {one.weight:g} times an epoch{on_average}"
        lines.append(f"      weight {one.weight:g}: {times}")
    return lines
