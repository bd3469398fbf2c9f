"""The files of a model folder: config.json, index, heads of the weights, tokenizer. Floor 1; read
once for all that look at them. Weights themselves are never read.
"""

from __future__ import annotations

import json
import math
import struct
import threading
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from vectorlm.plan.parameters import LARGEST_HEADER_BYTES
from vectorlm.tokenizer_files import TokenizerFile, read_tokenizer_file

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_WHOLE = "pytorch_model.bin"
POINTER = b"version https://git-lfs.github.com/spec"
# Where transformers looks for the text part of a model that has several.
_TEXT_CONFIGS = ("text_encoder", "decoder", "generator", "text_config")
_LENGTH_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "seq_length")
_LAYER_NAMES = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Tensor:
    shape: tuple[int, ...]
    dtype: str


class Broken(ValueError):
    """A file of the folder that cannot be used; the text says why."""


class ModelFiles:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    # --- config.json ---

    @cached_property
    def config(self) -> dict[str, Any]:
        """Broken where it cannot be read."""
        return read_object(self.folder / "config.json")

    @cached_property
    def sound_config(self) -> dict[str, Any]:
        """Empty where it cannot be read: for those who only want a fact of it."""
        try:
            return self.config
        except Broken:
            return {}

    @property
    def text_config(self) -> dict[str, Any]:
        inner = [self.sound_config.get(name) for name in _TEXT_CONFIGS]
        found = [value for value in inner if isinstance(value, dict)]
        return found[0] if len(found) == 1 else self.sound_config

    @property
    def model_type(self) -> str | None:
        found = self.sound_config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def vocab_size(self) -> int | None:
        return self._number("vocab_size")

    @property
    def max_positions(self) -> int | None:
        return next((n for n in map(self._number, _LENGTH_NAMES) if n), None)

    @property
    def layers(self) -> int | None:
        return next((n for n in map(self._number, _LAYER_NAMES) if n), None)

    def _number(self, name: str) -> int | None:
        found = self.text_config.get(name)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    # --- weights ---

    @cached_property
    def named_files(self) -> dict[str, str] | None:
        """Tensor -> file, as the index says; None where there is none. Broken if unreadable."""
        path = self.folder / INDEX
        if not path.exists():
            return None
        named = read_object(path).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
            raise Broken("has no weight_map")
        return named

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files the trainer would open."""
        named = self.named_files
        if named is not None:
            return [self.folder / name for name in sorted(set(named.values()))]
        whole = self.folder / WHOLE
        return [whole] if whole.exists() else []

    @cached_property
    def tensors(self) -> dict[str, Tensor] | None:
        """Every tensor of sound files; None where a file is missing or broken."""
        found: dict[str, Tensor] = {}
        try:
            for path in self.weight_files:
                found |= head(path)
        except (Broken, OSError):
            return None
        return found or None

    @property
    def weights_bytes(self) -> int:
        """As the files have them; 0 where that is not known."""
        tensors = self.tensors or {}
        return sum(math.prod(t.shape) * _BITS.get(t.dtype, 32) // 8 for t in tensors.values())

    # --- tokenizer ---

    @property
    def tokenizer(self) -> TokenizerFile | None:
        """None where there is no tokenizer.json; Broken where it cannot be read."""
        with self._lock:  # hundreds of MB: not twice at the same time
            found = self._tokenizer
        if isinstance(found, Broken):
            raise found
        return found

    @cached_property
    def _tokenizer(self) -> TokenizerFile | Broken | None:
        try:
            return read_tokenizer_file(self.folder)
        except ValueError as problem:
            return Broken(str(problem))


_BITS = {
    "F64": 64,
    "I64": 64,
    "U64": 64,
    "F32": 32,
    "I32": 32,
    "U32": 32,
    "F16": 16,
    "BF16": 16,
    "I16": 16,
    "U16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}


def read_object(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise Broken("is missing") from None
    except OSError as error:
        raise Broken(f"cannot be read ({error.strerror})") from error
    if raw.startswith(POINTER):
        raise Broken("is a git-lfs pointer, not the file itself")
    try:
        content = json.loads(raw)
    except ValueError as error:
        raise Broken(f"is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise Broken("holds no JSON object")
    return content


def head(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; Broken unless the file is as long as its head says."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        first = file.read(len(POINTER))
        if first == POINTER:
            raise Broken("is a git-lfs pointer, not the weights")
        if size < 8:
            raise Broken(f"has {size} bytes and is no safetensors file")
        (length,) = struct.unpack("<Q", first[:8])
        if length > min(LARGEST_HEADER_BYTES, size - 8):
            raise Broken(
                "is cut off in its head"
                if length < LARGEST_HEADER_BYTES
                else "is no safetensors file"
            )
        file.seek(8)
        entries = _entries(file.read(length))
    ends = [entry["data_offsets"][1] for entry in entries.values()]
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        what = "is cut off" if size < expected else "has a wrong size"
        raise Broken(f"{what}: {size:,} bytes, and its head says {expected:,}")
    return {n: Tensor(tuple(entry["shape"]), entry["dtype"]) for n, entry in entries.items()}


def _entries(raw: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(raw)
        del_meta = {name: entry for name, entry in entries.items() if name != "__metadata__"}
        for entry in del_meta.values():
            [int(number) for number in (*entry["shape"], *entry["data_offsets"])]
            str(entry["dtype"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"its head is no head of safetensors ({type(error).__name__})") from error
    return del_meta


def pickle_problem(path: Path) -> str | None:
    """What is wrong with a file that torch.save wrote, as far as its ends show."""
    try:
        with open(path, "rb") as file:
            first = file.read(len(POINTER))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if first == POINTER:
        return "is a git-lfs pointer, not the weights"
    if not first:
        return "is empty"
    if first.startswith(b"PK") and not zipfile.is_zipfile(path):
        return "is cut off"
    return None
