"""Files of tensors: model folders read tensor by tensor, safetensors written by shard. Floor 2.

`export` and `merge` call it. Files are mapped, not read, so a tensor costs memory only while it is
used, and those pages belong to the file: the system takes them back when it needs them.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vectorlm.errors import ExportError
from vectorlm.files import DISK_FULL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_UNITS = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def parse_size(text: str) -> int:
    """`5GB` -> 5000000000; GiB and the like are powers of 1024."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(found[2].upper()) if found else None
    size = int(float(found[1]) * factor) if found and factor else 0
    if size < 1:
        raise ExportError(
            f"--max-shard-size {text!r}: give a size such as 5GB or 500MB (units: KB MB GB TB KiB "
            "MiB GiB)"
        )
    return size


def human_size(n_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} bytes"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an ExportError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file") from None
    except (OSError, ValueError) as problem:
        raise ExportError(f"{path}: cannot be read as JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise ExportError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `torch.save` file, mapped where its format allows. Never runs code from "
    "the file."""
    try:
        tensors = _load_bin(path)
    except Exception as problem:  # torch raises nearly anything on a broken file
        if isinstance(problem, FileNotFoundError):
            raise ExportError(f"{path}: no such file") from None
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise ExportError(
            f"{path}: not a readable file of tensors (cut short, damaged, or holding other "
            f"objects): {reason}. Write it again, or export from a checkpoint with --from."
        ) from problem
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in tensors.values()
    ):
        raise ExportError(f"{path}: a dictionary of name -> tensor is expected")
    return tensors


def _load_bin(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as problem:
        # Files of the old format (before torch 1.6, and some hub repositories still) cannot be
        # mapped.
        if "_use_new_zipfile_serialization" not in str(problem):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)


class WeightFiles:
    """The weights of a Hugging Face model folder under their names on disk, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: dict[Path, Any] = {}
        self._files = self._locate()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> torch.Tensor:
        path = self._files[name]
        try:
            opened = self._open(path)
            return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        except (KeyError, SafetensorError) as problem:
            raise ExportError(
                f"{path}: holds no readable tensor {name}; copy the base model again"
            ) from problem

    def dtype(self) -> torch.dtype | None:
        """That of the first tensor of floats."""
        return next((t.dtype for t in map(self.read, self.names) if t.is_floating_point()), None)

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            self._opened[path] = (
                open_safetensors(path) if path.suffix == ".safetensors" else read_bin(path)
            )
        return self._opened[path]

    def _locate(self) -> dict[str, Path]:
        for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
            index = self.folder / f"{stem}.{ending}.index.json"
            single = self.folder / f"{stem}.{ending}"
            if single.exists():
                return dict.fromkeys(self._open(single).keys(), single)
            if index.exists():
                return {
                    name: self.folder / file
                    for name, file in read_json(index)["weight_map"].items()
                }
        raise ExportError(
            f"{self.folder}: holds no weights (model.safetensors or pytorch_model.bin, whole or "
            "with an index)"
        )


def open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as problem:
        raise ExportError(f"{path}: cut short or damaged: {problem}") from problem


class ShardWriter:
    """Collects tensors up to a size, writes them as a safetensors file, and forgets them."""

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder, self.max_shard_bytes = folder, max_shard_bytes
        self.n_bytes = 0
        self._held: dict[str, torch.Tensor] = {}
        self._held_bytes = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if self._held and self._held_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes

    def close(self) -> int:
        """Gives the shards their names, now that their number is known, writes the index, and "
        "returns the number."""
        self._flush()
        total = len(self._written)
        if total == 1:
            self._draft(1).rename(self.folder / "model.safetensors")
            return 1
        weight_map = {}
        for number, names in enumerate(self._written, start=1):
            file = f"model-{number:05d}-of-{total:05d}.safetensors"
            self._draft(number).rename(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {
            "metadata": {"total_size": self.n_bytes},
            "weight_map": dict(sorted(weight_map.items())),
        }
        write_json(self.folder / "model.safetensors.index.json", index)
        return total

    def _draft(self, number: int) -> Path:
        return self.folder / f"draft-{number:05d}.safetensors"

    def _flush(self) -> None:
        self._written.append(list(self._held))
        write_safetensors(self._draft(len(self._written)), self._held)
        self.n_bytes += self._held_bytes
        self._held, self._held_bytes = {}, 0


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    # The folder is renamed into place later; without this a crash could leave it named but empty.
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def return_freed_memory() -> None:
    """Makes glibc hand the memory of a freed tensor back to the system at once.

    After the first large free it keeps blocks of up to 32 MB for itself, and small objects between
    them can keep it from reusing them: the process then grows by the whole model. Other C
    libraries lack the call and are left as they are.
    """
    m_mmap_threshold = -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(m_mmap_threshold, 256 * 1024)


def require_space(folder: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(folder).free < needed_bytes:
        raise _no_space(folder, needed_bytes)


@contextmanager
def write_errors(folder: Path, needed_bytes: int) -> Iterator[None]:
    """Turns what the disk answers into one message."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        # safetensors writes outside Python and reports the number only in its text.
        number = getattr(problem, "errno", None) or _number_in(str(problem))
        if number in DISK_FULL:
            raise _no_space(folder, needed_bytes) from problem
        raise ExportError(f"{folder}: cannot be written: {problem}") from problem


def _number_in(text: str) -> int | None:
    found = re.search(r"os error (\d+)", text)
    return int(found[1]) if found else None


def _no_space(folder: Path, needed_bytes: int) -> ExportError:
    free = shutil.disk_usage(folder if folder.exists() else folder.parent).free
    return ExportError(
        f"{folder}: the disk is full or your quota is used up; needed {human_size(needed_bytes)}, "
        f"free on the disk {human_size(free)}. Make room, or write elsewhere with --out. Nothing "
        "was changed."
    )
