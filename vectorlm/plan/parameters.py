"""How many parameters a model folder holds, and how many are trained. Floor 1; no weights are read.

Names and shapes stand at the head of safetensors files; of other files only the size is known.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LARGEST_HEADER_BYTES = 100_000_000  # the format's own limit
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameters:
    every: int
    trained: int


def count_parameters(folder: Path, lora: Mapping[str, Any] | None) -> Parameters | None:
    """None where the folder has no weights that can be counted."""
    shapes = tensor_shapes(folder)
    if shapes is None:
        stored = _from_sizes(folder)
        # Adapters are about a hundredth; the shapes they follow are not known here.
        trained = stored if lora is None else stored // 100
        return Parameters(stored, trained) if stored else None
    every = sum(map(math.prod, shapes.values()))
    if lora is None:
        return Parameters(every, every)
    adapters = adapter_parameters(shapes, lora)
    return Parameters(every + adapters, adapters)


def tensor_shapes(folder: Path) -> Shapes | None:
    """Every tensor's shape, from the heads of the folder's safetensors files."""
    try:
        files = sorted(folder.glob("*.safetensors"))
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            files = [folder / name for name in sorted(named)]
        heads = [_head(path) for path in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
    return {name: shape for head in heads for name, shape in head.items()} or None


def _head(path: Path) -> Shapes:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > LARGEST_HEADER_BYTES:
            raise ValueError(f"{path}: no safetensors file")
        entries = json.loads(file.read(length))
    return {name: tuple(e["shape"]) for name, e in entries.items() if name != "__metadata__"}


def _from_sizes(folder: Path) -> int:
    try:
        stored = sum(path.stat().st_size for path in folder.glob("pytorch_model*.bin"))
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        return stored // BYTES.get(dtype, 4)
    except (OSError, ValueError, AttributeError, TypeError):
        return 0


def adapter_parameters(shapes: Shapes, lora: Mapping[str, Any]) -> int:
    """Two thin matrices for each layer that is adapted. Without `target_modules`, every matrix of
    the blocks: more than PEFT's own choice, and still little.
    """
    rank = lora.get("r") or 8
    saved = tuple(lora.get("modules_to_save") or ())
    total = 0
    for name, shape in shapes.items():
        module = name.rpartition(".")[0]
        if saved and module.endswith(saved):
            total += math.prod(shape)
        elif name.endswith(".weight") and len(shape) == 2 and _adapted(module, lora):
            total += rank * sum(shape)
    return total


def _adapted(module: str, lora: Mapping[str, Any]) -> bool:
    targets = lora.get("target_modules")
    if targets is None or targets == "all-linear":
        return re.search(r"embed|wte|wpe|lm_head", module) is None
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, module) is not None
        except re.error:
            return False
    return any(module == target or module.endswith(f".{target}") for target in targets)
