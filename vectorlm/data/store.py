"""The prepared folder: written by `vectorlm.preprocess`, read by `vectorlm.dataset`. Floor 2,
without torch.

`datasets.load_from_disk` opens it: Arrow shards, `state.json` and `dataset_info.json`, with our
`manifest.json` beside them. The format is in docs/decisions.md, section 2. A folder is written
beside its final name, synced, its manifest last, and renamed: what stands under the final name is
complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from vectorlm.data.pack import Row, Tokens
from vectorlm.errors import DataError
from vectorlm.files import DISK_FULL, sync, sync_folder, write_synced
from vectorlm.manifest import FORMAT, MANIFEST_NAME, Manifest, options_sha256, read_manifest

OWNER = "owner.json"
BATCH_TOKENS = 1 << 20
SHARD_BYTES = 512 << 20
FOREIGN_LEFTOVER_S = 24 * 3600

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
    """Writes rows into a temporary sibling; `publish` puts it in place, leaving the block without
    it removes it."""

    def __init__(
        self, folder: str | os.PathLike[str], *, max_seq_len: int, ignore_index: int
    ) -> None:
        # A symlink (to a scratch file system, say) keeps pointing where it does: its target is
        # replaced.
        self.folder = Path(os.path.realpath(folder))
        self.temporary = sibling(self.folder, "tmp")
        self.max_seq_len = max_seq_len
        self.ignore_index = ignore_index
        self.pending: list[Row] = []
        self.pending_tokens = 0
        self.rows = self.tokens = self.supervised_tokens = self.longest_row = 0
        self.max_token_id = -1
        self.shards = 0
        self.file: BinaryIO | None = None
        self.stream: pa.RecordBatchStreamWriter | None = None

    def __enter__(self) -> RowWriter:
        with explained(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            existing_manifest(self.folder)
            remove_leftovers(self.folder)
            self.temporary.mkdir()
            owner = {"host": socket.gethostname(), "pid": os.getpid()}
            try:
                write_synced(self.temporary / OWNER, json.dumps(owner))
            except OSError:
                shutil.rmtree(self.temporary, ignore_errors=True)
                raise
        return self

    def __exit__(self, *_: object) -> None:
        # Also after a full disk, when closing fails again; what matters is that nothing stays
        # behind.
        with suppress(OSError, pa.ArrowException):
            self.close_shard()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def add(self, row: Row) -> None:
        self.pending.append(row)
        self.pending_tokens += len(row.input_ids)
        if self.pending_tokens >= BATCH_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        batch = record_batch(self.pending, self.rows)
        self.count(batch)
        self.pending, self.pending_tokens = [], 0
        with explained(self.folder):
            self.write(batch)

    def count(self, batch: pa.RecordBatch) -> None:
        ids = batch.column("input_ids")
        self.rows += batch.num_rows
        self.tokens += len(ids.values)
        labels = batch.column("labels").values.to_numpy()
        self.supervised_tokens += int(np.count_nonzero(labels != self.ignore_index))
        self.longest_row = max(self.longest_row, int(np.diff(ids.offsets.to_numpy()).max()))
        self.max_token_id = max(self.max_token_id, int(ids.values.to_numpy().max(initial=-1)))

    def write(self, batch: pa.RecordBatch) -> None:
        if self.file and self.file.tell() + batch.nbytes > SHARD_BYTES:
            self.close_shard()
        if self.stream is None:
            self.file = open_shard(self.temporary / f"data-{self.shards:05d}.arrow")
            self.stream = pa.ipc.new_stream(self.file, SCHEMA)
            self.shards += 1
        self.stream.write_batch(batch)

    def close_shard(self) -> None:
        file, stream = self.file, self.stream
        self.file = self.stream = None
        if file and stream:
            with file:
                stream.close()
                sync(file)

    def publish(
        self,
        *,
        documents: int,
        skipped: Mapping[str, int],
        tokenizer_sha256: str,
        tokenizer_file_sha256: str | None = None,
        source_sha256: str,
        options: Mapping[str, Any],
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
        )
        with explained(self.folder):
            self.close_shard()
            self.complete(manifest)
            put_in_place(self.temporary, self.folder)
        return manifest

    def complete(self, manifest: Manifest) -> None:
        names = [f"data-{n:05d}-of-{self.shards:05d}.arrow" for n in range(self.shards)]
        for number, name in enumerate(names):
            os.rename(self.temporary / f"data-{number:05d}.arrow", self.temporary / name)
        write_synced(self.temporary / "dataset_info.json", json.dumps(DATASET_INFO, indent=2))
        write_synced(
            self.temporary / "state.json", json.dumps(dataset_state(names, manifest), indent=2)
        )
        (self.temporary / OWNER).unlink()
        write_synced(self.temporary / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")
        sync_folder(self.temporary)


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


def record_batch(rows: list[Row], first_id: int) -> pa.RecordBatch:
    ids = np.arange(first_id, first_id + len(rows), dtype=np.int64)
    columns = [
        list_array([row.input_ids for row in rows]),
        list_array([row.labels for row in rows]),
        pa.array(ids),
        list_array([row.boundaries for row in rows]),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def list_array(parts: list[Tokens]) -> pa.ListArray:
    offsets = np.zeros(len(parts) + 1, np.int32)
    np.cumsum([len(part) for part in parts], out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, np.concatenate(parts))


# --- the folder itself --------------------------------------------------------------


def existing_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """What stands under the final name: None if nothing; a DataError if it is not ours to
    replace."""
    path = Path(os.path.realpath(folder))
    restore_aside(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not path.is_dir() or not (path / MANIFEST_NAME).exists():
        raise DataError(
            f"{folder}: exists and is no prepared data of ours (it has no manifest.json), "
            "so it is left alone.\n"
            "Choose another save_path, or remove it yourself."
        )
    return read_manifest(path)


def sibling(folder: Path, what: str) -> Path:
    return folder.parent / f".{folder.name}.{what}-{os.getpid()}"


def siblings(folder: Path, what: str) -> list[Path]:
    """Those of all runs; compared as text, because the name may hold characters special to glob."""
    prefix = f".{folder.name}.{what}-"
    try:
        return sorted(path for path in folder.parent.iterdir() if path.name.startswith(prefix))
    except OSError:
        return []


def put_in_place(temporary: Path, folder: Path) -> None:
    """The old folder makes way only now that the new one is complete."""
    aside = sibling(folder, "old")
    if folder.exists():
        os.rename(folder, aside)
    os.rename(temporary, folder)
    sync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_aside(folder: Path) -> None:
    """A run that died between the two renames left the good old folder under its other name."""
    for aside in siblings(folder, "old"):
        if not folder.exists() and (aside / MANIFEST_NAME).exists():
            with suppress(OSError):
                os.rename(aside, folder)


def remove_leftovers(folder: Path) -> None:
    dead = [path for path in siblings(folder, "tmp") if is_leftover(path)]
    # Once a complete folder has the final name, what was moved aside for it is of no use.
    replaced = siblings(folder, "old") if (folder / MANIFEST_NAME).exists() else []
    for path in dead + replaced:
        shutil.rmtree(path, ignore_errors=True)


def is_leftover(temporary: Path) -> bool:
    """Ours, and its run is gone; a run on another machine counts as gone after a day without a
    write."""
    try:
        if temporary.stat().st_uid != os.getuid():
            return False
        owner = json.loads((temporary / OWNER).read_text())
        if owner["host"] == socket.gethostname():
            return not is_alive(int(owner["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return time.time() - last_write(temporary) > FOREIGN_LEFTOVER_S


def is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return (
            False  # we are about to write ours, so this one is of an earlier process of that number
        )
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def last_write(folder: Path) -> float:
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except OSError:
        return time.time()


# --- the disk -----------------------------------------------------------------------


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into one message for the user."""
    try:
        yield
    except OSError as error:
        raise DataError(disk_message(folder, error)) from error


def disk_message(folder: Path, error: OSError) -> str:
    if error.errno not in DISK_FULL:
        return (
            f"{folder}: cannot be written: {error}.\n"
            "Check the permissions, or choose another save_path."
        )
    causes = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "your quota is used up"}
    return (
        f"{folder}: {causes.get(error.errno, 'the file size limit (ulimit -f) is reached')} "
        f"({free_space(folder)} free on this file system). What was half-written is removed.\n"
        "Prepared data takes about 8 bytes a token: free space, or set save_path to another file "
        "system."
    )


def free_space(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder.parent).free / 2**20:,.0f} MiB"
    except OSError:
        return "unknown space"


def open_shard(path: Path) -> BinaryIO:
    return open(path, "wb")
