"""Reading a model folder's safetensors piece by piece, and placing pieces into shards.
Floor 2, used by `load`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from vectorlm.errors import ModelError

Read = Callable[[tuple[slice, ...]], torch.Tensor]


class Weights:
    """The tensors of a folder's safetensors files, by name; files are opened when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files: dict[str, safe_open] = {}
        self.files = self._index()

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            try:
                return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(
                    f"{index}: cannot be read ({error}); copy the model folder again"
                ) from error
        if (self.folder / "model.safetensors").exists():
            return dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        return {}

    def _file(self, name: str) -> safe_open:
        if name not in self._open_files:
            path = self.folder / name
            try:
                self._open_files[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(
                    f"{path}: cannot be read ({error}); copy the model folder again, it is "
                    "incomplete"
                ) from error
        return self._open_files[name]

    def shape(self, name: str) -> list[int]:
        return list(self._file(self.files[name]).get_slice(name).get_shape())

    def reader(self, name: str) -> Read:
        part = self._file(self.files[name]).get_slice(name)
        return lambda where: part[where] if where else self._file(self.files[name]).get_tensor(name)


def place(
    target: torch.Tensor,
    read: Read,
    shape: list[int],
    name: str,
    padding: tuple[int, int] = (0, 0),
) -> None:
    """Fill `target` (perhaps one shard of a DTensor) from a source of `shape`.

    `padding`: the vocabulary and what it is padded to; such a tensor's further rows are zero.
    """
    padded = bool(shape) and (shape[0], target.shape[0]) == padding
    if list(target.shape)[padded:] != shape[padded:]:
        raise ModelError(
            f"{name}: the model's config asks for shape {list(target.shape)}, its weights have "
            f"{shape}; the folder mixes two models, or its config was edited"
        )
    local, offsets = target, (0,) * target.dim()
    if isinstance(target, DTensor):
        _, offsets = compute_local_shape_and_global_offset(
            target.shape, target.device_mesh, target.placements
        )
        local = target.to_local()
    if not local.numel():
        return
    where = tuple(
        slice(start, min(start + size, limit))
        for start, size, limit in zip(offsets, local.shape, shape, strict=True)
    )
    if where and where[0].stop < where[0].start + local.shape[0]:
        local.zero_()
        if where[0].stop <= where[0].start:
            return
        local = local[: where[0].stop - where[0].start]
    local.copy_(read(where))
