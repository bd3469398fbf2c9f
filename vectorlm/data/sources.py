"""The files of `load_path` as rows, with their content hash. Floor 2.

Called by `vectorlm.preprocess`. `vectorlm.source_files` decides which files and complains;
`Source.batches` streams what `vectorlm.readers` makes of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from vectorlm import readers
from vectorlm.config.schema import DatasetPreprocess
from vectorlm.errors import DataError
from vectorlm.readers import Opened, Wanted
from vectorlm.row_batch import Position, RowBatch
from vectorlm.source_files import (
    common_folder,
    contents_sha256,
    find_files,
    several_splits,
)

START = Position()


class Source:
    """Files of one kind, in a fixed order; `fraction` says how much of them has been read."""

    def __init__(
        self, name: str, kind: str, root: Path, files: Iterable[Path], options: DatasetPreprocess
    ) -> None:
        self.name = name
        self.kind = kind
        self.root = root
        self.files = tuple(files)
        self.field = options.data_field
        self.text_rows = options.text_rows
        self.states = [file_state(file) for file in self.files]
        self.ends = list(accumulate(size for size, _ in self.states))
        self.total_bytes = self.ends[-1] if self.ends else 0
        self.read_bytes = 0

    def texts(self, start: Position = START) -> Iterator[RowBatch]:
        """The texts of `data_field`, from a position on that an earlier batch had in `after`."""
        return self.read(Wanted(self.field), start)

    def batches(
        self, columns: Sequence[str] | None = None, start: Position = START
    ) -> Iterator[RowBatch]:
        """Whole records as dicts, or these columns of them; the rows of plain text files are
        texts."""
        return self.read(Wanted(None, None if columns is None else tuple(columns)), start)

    def read(self, wanted: Wanted, start: Position) -> Iterator[RowBatch]:
        for number in range(start.file, len(self.files)):
            path, before = self.files[number], self.ends[number] - self.states[number][0]
            here = start if number == start.file else START
            with readers.reading(path, self.kind, self.text_rows, wanted, here) as one:
                for batch in one.batches:
                    self.read_bytes = before + one.file.tell()
                    yield batch._replace(after=batch.after._replace(file=number))
            self.read_bytes = self.ends[number]

    def fraction(self) -> float:
        return self.read_bytes / max(self.total_bytes, 1)

    def sha256(self) -> str:
        """Over the files' contents and relative names; where they lie and when they were written
        is not in it."""
        return contents_sha256(self.root, self.files)

    def check_unchanged(self) -> None:
        """The hash was taken before the rows were read: a file that changed in between would belie
        it."""
        for path, state in zip(self.files, self.states, strict=True):
            if file_state(path) != state:
                raise DataError(
                    f"{path}: changed while it was read. Prepare again when nothing writes to it."
                )


class HubSource(Source):
    """A dataset of the hub, downloaded and cached by `datasets`."""

    def __init__(self, name: str, dataset: Any, options: DatasetPreprocess) -> None:
        files = sorted(Path(item["filename"]) for item in dataset.cache_files)
        super().__init__(name, "hf", common_folder(files) if files else Path(), files, options)
        self.dataset = dataset
        self.rows_read = 0

    def read(self, wanted: Wanted, start: Position) -> Iterator[RowBatch]:
        names = readers.column_names(self.name, self.dataset.features.arrow_schema, wanted)
        rows = self.dataset.select_columns(names).with_format("arrow").iter(readers.ROWS_AT_ONCE)
        for batch in readers.read_batches(Opened(Path(self.name), None, wanted, start), rows):
            self.rows_read = batch.after.place
            yield batch

    def fraction(self) -> float:
        return self.rows_read / max(len(self.dataset), 1)


# --- finding ------------------------------------------------------------------------


def find_source(
    options: DatasetPreprocess, load_path: str | None = None, split: str | None = None
) -> Source:
    """The source at `load_path` (by default the training data's, with its split)."""
    if load_path is None:
        load_path, split = options.load_path, options.split
    found = find_files(options, load_path, split)
    if found is None:
        return hub_source(load_path, split, options)
    return Source(load_path, found.kind, found.root, found.files, options)


# --- the hub ------------------------------------------------------------------------


def hub_source(name: str, split: str | None, options: DatasetPreprocess) -> Source:
    import logging

    import datasets
    import huggingface_hub

    logging.getLogger(huggingface_hub.__name__).setLevel(logging.ERROR)  # it tells each attempt
    if not _has_network(huggingface_hub.constants.ENDPOINT):
        # Only what is cached can be had; the client would try for half a minute.
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        found = datasets.load_dataset(name, split=split)
    # The hub's client and `datasets` raise errors of a dozen libraries; all mean that it cannot be
    # had.
    except Exception as error:
        raise DataError(not_loaded(name, error)) from error
    if isinstance(found, dict):
        if len(found) > 1:
            raise DataError(several_splits(name, list(found)))
        found = next(iter(found.values()))
    return HubSource(name, found, options)


def _has_network(endpoint: str) -> bool:
    """Whether the host has an address; where a proxy asks for it, nothing can be told."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, None)
    except OSError:
        return False
    return True


def not_loaded(name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()
    return (
        f"load_path: there is no file or folder {name} here, "
        "and as a dataset of the hub it cannot be loaded "
        f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}).\n"
        "Mend the path. For a dataset of the hub: where there is a network, run\n"
        f"  python -c \"import datasets; datasets.load_dataset('{name}')"
        ".save_to_disk('<folder>')\"\n"
        "and set load_path to that folder."
    )


# --- files --------------------------------------------------------------------------


def file_state(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    return state.st_size, state.st_mtime_ns
