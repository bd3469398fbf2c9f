"""The prepared folder: written by `vectorlm.preprocess`, read by `vectorlm.dataset`. Floor 2,
without torch.

`datasets.load_from_disk` opens it: Arrow shards, `state.json` and `dataset_info.json`, with our
`manifest.json` beside them. The format is in docs/decisions.md, section 2. A folder is written
beside its final name, synced, its manifest last, and renamed: what stands under the final name is
complete. `data.workplace` has the folder beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from vectorlm.data.documents import Offsets, RowBlock, block_of, joined
from vectorlm.data.workplace import Workplace, existing_manifest, explained
from vectorlm.errors import DataError
from vectorlm.files import sync, sync_folder, write_synced
from vectorlm.manifest import (
    FORMAT,
    MANIFEST_NAME,
    REFUSED_NAME,
    Manifest,
    SourceCounts,
    options_sha256,
    read_manifest,
)
from vectorlm.row import Row, Tokens

__all__ = [
    "MANIFEST_NAME",
    "SCHEMA",
    "Manifest",
    "RowWriter",
    "existing_manifest",
    "open_rows",
    "read_manifest",
]

BATCH_TOKENS = 1 << 18
SHARD_BYTES = 128 << 20

SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("id", pa.int64()),
        ("boundaries", pa.list_(pa.int32())),
    ]
)


# --- reading ------------------------------------------------------------------------


def open_rows(folder: str | os.PathLike[str]) -> pa.Table:
    """The rows of a prepared folder, memory-mapped: only what is asked for is read."""
    path = Path(folder)
    manifest = read_manifest(path)
    batches = [batch for shard in shard_paths(path) for batch in map_shard(shard)]
    table = pa.Table.from_batches(batches, schema=SCHEMA)
    if table.num_rows != manifest.rows:
        raise DataError(
            f"{path}: {table.num_rows:,} rows are there but manifest.json says "
            f"{manifest.rows:,}.\n"
            "Files were removed or changed. Delete the folder and prepare it anew."
        )
    return table


def shard_paths(folder: Path) -> list[Path]:
    state = folder / "state.json"
    try:
        content = json.loads(state.read_text(encoding="utf-8"))
        return [folder / item["filename"] for item in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{state}: cannot be read ({error}).\nDelete {folder} and prepare it anew."
        ) from error


def map_shard(path: Path) -> list[pa.RecordBatch]:
    try:
        return list(pa.ipc.open_stream(pa.memory_map(str(path))))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path}: cannot be read ({error}).\nDelete {path.parent} and prepare it anew."
        ) from error


# --- writing ------------------------------------------------------------------------


class RowWriter:
    """Writes rows into a temporary folder; `publish` puts it in place, leaving the block without it
    removes it. Only an interruption leaves it there, for the next run to go on from."""

    def __init__(
        self, folder: str | os.PathLike[str], *, max_seq_len: int, ignore_index: int
    ) -> None:
        self.place = Workplace(folder)
        self.max_seq_len = max_seq_len
        self.ignore_index = ignore_index
        self.pending: list[RowBlock] = []
        self.pending_tokens = 0
        self.rows = self.tokens = self.supervised_tokens = self.longest_row = 0
        self.max_token_id = -1
        self.shard_bytes: list[int] = []  # of those that are closed
        self.rested_shards = 0
        self.file: BinaryIO | None = None
        self.stream: pa.RecordBatchStreamWriter | None = None

    @property
    def temporary(self) -> Path:
        return self.place.temporary

    def __enter__(self) -> RowWriter:
        self.place.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Also after a full disk, when closing fails again; what matters is that nothing stays
        # behind.
        with suppress(OSError, pa.ArrowException):
            self.close_shard()
        self.place.leave(keep=kind is not None and not issubclass(kind, Exception))

    def add_row(self, row: Row) -> None:
        self.add(block_of([row]))

    def add(self, block: RowBlock) -> None:
        self.pending.append(block)
        self.pending_tokens += len(block.ids)
        if self.pending_tokens >= BATCH_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        block = joined(self.pending)
        self.pending, self.pending_tokens = [], 0
        batch = record_batch(block, self.rows)
        self.count(block)
        with explained(self.place.folder):
            self.write(batch)

    def count(self, block: RowBlock) -> None:
        self.rows += block.rows
        self.tokens += len(block.ids)
        self.supervised_tokens += int(np.count_nonzero(block.labels != self.ignore_index))
        self.longest_row = max(self.longest_row, int(np.diff(block.offsets).max()))
        self.max_token_id = max(self.max_token_id, int(block.ids.max(initial=-1)))

    def write(self, batch: pa.RecordBatch) -> None:
        if self.stream is None:
            self.file = open_shard(self.temporary / shard_name(len(self.shard_bytes)))
            self.stream = pa.ipc.new_stream(self.file, SCHEMA)
        self.stream.write_batch(batch)
        if self.file and self.file.tell() >= SHARD_BYTES:
            self.close_shard()

    def close_shard(self) -> None:
        file, stream = self.file, self.stream
        self.file = self.stream = None
        if file and stream:
            with file:
                stream.close()
                sync(file)
                self.shard_bytes.append(file.tell())

    # --- interruptions ---

    def rest(self) -> bool:
        """Once a shard is complete: puts all that there is into whole shards, so that it can be
        recorded. It has to be asked at the same places in every run, for the bytes to be the
        same."""
        if len(self.shard_bytes) == self.rested_shards:
            return False
        self.flush()
        with explained(self.place.folder):
            self.close_shard()
        self.rested_shards = len(self.shard_bytes)
        return True

    def record(self, made_from: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        own = {name: getattr(self, name) for name in COUNTS}
        with explained(self.place.folder):
            self.place.record(made_from, {"writer": own, **state})

    def resume(self, made_from: Callable[[], Mapping[str, Any]]) -> dict[str, Any] | None:
        """The state that an interrupted run recorded last, if it made the same; else this run
        begins with an empty folder. `made_from` is asked only where there is such a run."""
        with explained(self.place.folder):
            state = self.place.recorded(made_from)
            sizes = state["writer"]["shard_bytes"] if state else []
            if state is None or not self.place.keep_only(
                {shard_name(number): size for number, size in enumerate(sizes)}, [REFUSED_NAME]
            ):
                self.place.clear()
                return None
        for name in COUNTS:
            setattr(self, name, state["writer"][name])
        self.rested_shards = len(self.shard_bytes)
        return state

    # --- the end ---

    def publish(
        self,
        *,
        documents: int,
        skipped: Mapping[str, int],
        tokenizer_sha256: str,
        tokenizer_file_sha256: str | None = None,
        source_sha256: str,
        options: Mapping[str, Any],
        cut_documents: int | None = None,
        sources: Sequence[SourceCounts] = (),
    ) -> Manifest:
        self.flush()
        manifest = Manifest(
            format=FORMAT,
            max_seq_len=self.max_seq_len,
            ignore_index=self.ignore_index,
            rows=self.rows,
            documents=documents,
            tokens=self.tokens,
            supervised_tokens=self.supervised_tokens,
            fill=self.tokens / max(self.rows * self.max_seq_len, 1),
            longest_row=self.longest_row,
            max_token_id=self.max_token_id,
            skipped=dict(sorted(skipped.items())),
            tokenizer_sha256=tokenizer_sha256,
            tokenizer_file_sha256=tokenizer_file_sha256,
            source_sha256=source_sha256,
            options=dict(options),
            options_sha256=options_sha256(options),
            cut_documents=cut_documents,
            sources=list(sources),
        )
        with explained(self.place.folder):
            self.close_shard()
            self.complete(manifest)
            self.place.put_in_place()
        return manifest

    def complete(self, manifest: Manifest) -> None:
        count = len(self.shard_bytes)
        names = [f"data-{n:05d}-of-{count:05d}.arrow" for n in range(count)]
        for number, name in enumerate(names):
            os.rename(self.temporary / shard_name(number), self.temporary / name)
        write_synced(self.temporary / "dataset_info.json", json.dumps(DATASET_INFO, indent=2))
        write_synced(
            self.temporary / "state.json", json.dumps(dataset_state(names, manifest), indent=2)
        )
        self.place.tidy()
        write_synced(self.temporary / MANIFEST_NAME, manifest_text(manifest))
        sync_folder(self.temporary)


def rewrite_manifest(folder: str, manifest: Manifest) -> None:
    path = Path(folder) / MANIFEST_NAME
    fresh = path.with_name(f".{MANIFEST_NAME}.new")
    with explained(path.parent):
        write_synced(fresh, manifest_text(manifest))
        os.replace(fresh, path)
        sync_folder(path.parent)


def manifest_text(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=2) + "\n"


COUNTS = (
    "rows",
    "tokens",
    "supervised_tokens",
    "longest_row",
    "max_token_id",
    "shard_bytes",
)


# Without `features`, `datasets` reads them from the Arrow schema, whatever names its version gives
# to list types.
DATASET_INFO = {"citation": "", "description": "", "features": None, "homepage": "", "license": ""}


def dataset_state(names: list[str], manifest: Manifest) -> dict[str, Any]:
    inputs = manifest.source_sha256 + manifest.tokenizer_sha256 + manifest.options_sha256
    return {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": hashlib.sha256(inputs.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }


def record_batch(block: RowBlock, first_id: int) -> pa.RecordBatch:
    numbers = np.arange(first_id, first_id + block.rows, dtype=np.int64)
    columns = [
        list_array(block.ids, block.offsets),
        list_array(block.labels, block.offsets),
        pa.array(numbers),
        list_array(block.boundaries, block.boundary_offsets),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def list_array(values: Tokens, offsets: Offsets) -> pa.ListArray:
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values)


def shard_name(number: int) -> str:
    return f"data-{number:05d}.arrow"


def open_shard(path: Path) -> BinaryIO:
    return open(path, "wb")
