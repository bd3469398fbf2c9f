"""Checkpoints: sharded tensors and JSON, written whole or not at all. Floor 2, used by `trainer`
and `export`.

    checkpoints/step_00000500/
        __0_0.distcp ...  tensors, a file a rank, through torch.distributed.checkpoint
        .metadata         DCP's index of them (read with weights_only=True)
        state.json        position, schedule, scaler, config, names
        MANIFEST.json     size and SHA-256 of every file; written last

A folder without a matching MANIFEST.json does not count as a checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import StorageMeta

from vectorlm.distributed import Ranks, rank_left
from vectorlm.errors import CheckpointError
from vectorlm.files import DISK_FULL, sha256, sync, sync_folder, write_synced

MANIFEST = "MANIFEST.json"
STATE = "state.json"
INDEX = ".metadata"
FORMAT = 1
T = TypeVar("T")
_STEP = re.compile(r"step_(\d{8,})$")
UNFINISHED = ".unfinished-"
# torch's writer says no more when the disk refuses in the middle of a tensor.
_TORCH_CANNOT_WRITE = "[enforce fail at inline_container"
# All that DCP's index is made of; nothing else may be built from the file.
_INDEX_CLASSES: list[Any] = [
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.TensorStorageMetadata,
    metadata.TensorProperties,
    metadata.ChunkStorageMetadata,
    StorageMeta,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
]


@dataclass
class Found:
    """The newest sound checkpoint, and what was wrong with newer ones."""

    folder: Path | None
    skipped: dict[str, str] = field(default_factory=dict)


def folder_of(output_dir: str | Path) -> Path:
    return Path(output_dir) / "checkpoints"


def step_folders(output_dir: str | Path) -> list[Path]:
    """Every folder named as a checkpoint, newest first."""
    root = folder_of(output_dir)
    found = (
        [path for path in root.glob("step_*") if _STEP.match(path.name)] if root.is_dir() else []
    )
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    match = _STEP.match(folder.name)
    assert match, folder
    return int(match[1])


class Checkpoints:
    """The checkpoints of a run, written and read by all its ranks together."""

    def __init__(
        self,
        output_dir: str,
        ranks: Ranks,
        keep: int,
        allow_foreign: bool,
        require_folder: Callable[[], None] = lambda: None,
    ) -> None:
        self.root = folder_of(output_dir)
        self.output_dir = output_dir
        self.ranks, self.keep, self.allow_foreign = ranks, keep, allow_foreign
        self.require_folder = require_folder

    def apart(self) -> Checkpoints:
        """The same, written through lines of their own: from a thread beside the one that
        trains.
        """
        return Checkpoints(
            self.output_dir, self.ranks.apart(), self.keep, self.allow_foreign, self.require_folder
        )

    def save(self, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        final = self.root / f"step_{step:08d}"
        token = self.ranks.from_first(uuid.uuid4().hex[:12])
        unfinished = self.root / f"{UNFINISHED}{final.name}-{token}"
        needed = _whole_bytes(tensors)
        self.ranks.together(lambda: self._prepare(unfinished, needed))
        try:
            dcp.save(tensors, storage_writer=_Writer(unfinished), process_group=self.ranks.group)
            parts = self._everywhere(lambda: self._finish_files(unfinished, state))
            self._everywhere(lambda: self._publish(unfinished, final, parts))
        except (CheckpointException, OSError) as error:
            self.require_folder()  # another start may have cleared ours away
            if self.ranks.first:
                shutil.rmtree(unfinished, ignore_errors=True)
            cause = _cause(error)
            if rank_left(cause):
                raise cause from None
            raise CheckpointError(_not_saved(final, needed, cause)) from None
        return final

    def require_space(self, tensors: dict[str, torch.Tensor]) -> None:
        """Refuse at the start of a run what its first save would refuse hours later."""
        needed = _whole_bytes(tensors)
        free = self.ranks.from_first(_free_bytes(self.root.parent))
        if free < needed:
            raise CheckpointError(
                f"{self.root}: a checkpoint of this run needs {_gib(needed)}, but only "
                f"{_gib(free)} are free; make room, or give another train_parameters.output_dir"
            )

    def _everywhere(self, work: Callable[[], T]) -> list[T]:
        """What `work` gives on every rank; what the disk refuses on one is raised on all."""
        outcomes = self.ranks.gather(_or_refusal(work))
        for outcome in outcomes:
            if isinstance(outcome, OSError):
                raise outcome
        return cast(list[T], outcomes)

    def _prepare(self, unfinished: Path, needed: int) -> None:
        if not self.ranks.first:
            return
        try:
            os.makedirs(unfinished, mode=0o700)
            os.chmod(self.root, 0o700)
            free = shutil.disk_usage(unfinished).free
        except OSError as error:
            raise CheckpointError(f"{self.root}: cannot be written: {error}") from error
        if free < needed:
            unfinished.rmdir()
            raise CheckpointError(_not_saved(unfinished.parent, needed, OSError(errno.ENOSPC, "")))

    def _finish_files(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Hash what this rank wrote; the first rank adds what is written once."""
        names = [path.name for path in folder.glob(f"__{self.ranks.rank}_*")]
        if self.ranks.first:
            write_synced(folder / STATE, json.dumps(state, indent=1))
            names += [STATE, INDEX]
        return {name: _entry(folder / name) for name in names}

    def _publish(self, unfinished: Path, final: Path, parts: list[dict[str, Any]]) -> None:
        if not self.ranks.first:
            return
        files = {name: entry for part in parts for name, entry in sorted(part.items())}
        write_synced(
            unfinished / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1)
        )
        sync_folder(unfinished)
        self.require_folder()
        if final.exists():  # damaged, or from a run that was cut off: ours is sound
            os.rename(final, unfinished.with_name(unfinished.name + "-replaced"))
        os.rename(unfinished, final)
        sync_folder(self.root)
        self._prune(step_of(final))

    def _prune(self, newest: int) -> None:
        older = [f for f in step_folders(self.output_dir) if step_of(f) <= newest]
        for folder in older[self.keep :]:
            shutil.rmtree(folder, ignore_errors=True)
        self.remove_unfinished(suffix="-replaced")

    def remove_unfinished(self, suffix: str = "") -> None:
        """Remove what interrupted saves left behind; only at the start, before any save."""
        for folder in self.root.glob(f"{UNFINISHED}*{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)

    def find(self) -> Found:
        """The newest checkpoint that is complete and whose every byte is as written."""
        found = Found(None)
        for folder in self.ranks.from_first(step_folders(self.output_dir)):
            problem = self._check(folder)
            if problem is None:
                return Found(folder, found.skipped)
            found.skipped[folder.name] = problem
        return found

    def _check(self, folder: Path) -> str | None:
        self.ranks.together(lambda: check_owner(folder, self.allow_foreign))
        mine = _or_message(lambda: verify(folder, self.ranks.rank, self.ranks.world))
        problems = [problem for problem in self.ranks.gather(mine) if problem]
        return problems[0] if problems else None

    def load(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Fill `tensors` in place; they may be sharded otherwise than when they were saved."""
        _read(folder, _Reader(folder), tensors, together=True)


def _read(folder: Path, reader: _Reader, tensors: dict[str, torch.Tensor], together: bool) -> None:
    reader.read_metadata()  # now, for a message of ours if it is not to be trusted
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=not together)
    except CheckpointException as error:
        raise CheckpointError(
            f"{folder}: does not fit this run: {_cause(error)}; was it made with another model or "
            "other adapters?"
        ) from error


def check_owner(folder: Path, allow_foreign: bool) -> None:
    owner = folder.stat().st_uid
    if owner != os.geteuid() and not allow_foreign:
        raise CheckpointError(
            f"{folder}: belongs to user {owner}, not to you ({os.geteuid()}); if you trust it, set "
            "train_parameters.allow_foreign_checkpoints: true"
        )


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Check every `parts`-th file of a checkpoint against its manifest; by default, all."""
    for name, entry in sorted(_listed_files(folder).items())[part::parts]:
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{name} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(f"{name} has {path.stat().st_size} bytes, not {entry['bytes']}")
        if sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{name} is damaged (its SHA-256 differs)")


def _listed_files(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{MANIFEST} has format {manifest.get('format')}; this version reads {FORMAT}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {STATE, INDEX} <= files.keys():
        raise CheckpointError(f"{MANIFEST} does not list {STATE} and {INDEX}")
    return files


def newest(output_dir: str | Path) -> Path | None:
    """The newest sound checkpoint, for one process."""
    for folder in step_folders(output_dir):
        try:
            verify(folder)
        except CheckpointError:
            continue
        return folder
    return None


def read_state(folder: Path) -> dict[str, Any]:
    return _read_json(folder / STATE)


def read_parameters(folder: Path, verify_files: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
    """What was trained, tensor by tensor, whole, on the host, under the names of the export."""
    if verify_files:
        verify(folder)
    reader = _Reader(folder)
    index = reader.read_metadata().state_dict_metadata
    for name, saved_name in read_state(folder)["names"].items():
        entry = index[f"model.{name}"]
        tensor = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():  # one process is just what is wanted
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            _read(folder, reader, {f"model.{name}": tensor}, together=False)
        yield saved_name, tensor


class _Writer(dcp.FileSystemWriter):
    """Writes DCP's index so that it can be read without free pickle."""

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        metadata.storage_meta = StorageMeta()  # it named the temporary folder
        with open(Path(self.path) / INDEX, "wb") as file:
            torch.save(metadata, file)
            sync(file)


class _Reader(dcp.FileSystemReader):
    _index: Any = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Keeps the index, so that tensors can be read one after another."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._index is None:
            path = Path(self.path) / INDEX
            try:
                with torch.serialization.safe_globals(_INDEX_CLASSES):
                    self._index = torch.load(path, weights_only=True)
            except (pickle.UnpicklingError, RuntimeError, OSError, EOFError) as error:
                raise CheckpointError(
                    f"{path}: is no index of tensors as this program writes it, and was not "
                    "opened; do not trust this checkpoint: remove its folder"
                ) from error
        return self._index


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing, so it was never finished") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} cannot be read (it holds no JSON object)")
    return content


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _whole_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """What all ranks write together: a sharded tensor counts whole, a replicated one once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _or_refusal(work: Callable[[], T]) -> T | OSError:
    try:
        return work()
    except OSError as error:
        return error


def _or_message(work: Callable[[], None]) -> str | None:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def _cause(error: BaseException) -> BaseException:
    """The cause inside DCP's exception, which carries one failure a rank."""
    if not isinstance(error, CheckpointException):
        return error
    failures = [failure[0] for failure in error.failures.values()]
    return next((f for f in failures if isinstance(f, OSError)), failures[0])


def _not_saved(final: Path, needed: int, problem: BaseException) -> str:
    free = _free_bytes(final)
    full = (
        free < needed
        or (isinstance(problem, OSError) and problem.errno in DISK_FULL)
        or _TORCH_CANNOT_WRITE in str(problem)
    )
    why = "the disk is full or your quota is used up" if full else str(problem)
    return (
        f"{final}: the checkpoint could not be saved: {why} (needed {_gib(needed)}, free "
        f"{_gib(free)}); earlier checkpoints are intact. Make room or lower "
        "train_parameters.keep_checkpoints, then start again"
    )


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
