"""Which layers adapters are put on, and how many parameters they have. Floor 1, read by `plan`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vectorlm.plan.shapes import Matrix, ModelShape

USUAL_RANK = 8
# Ways to begin that neither read nor change the base weights, which adapters alone cannot carry.
STARTS = (True, False, "gaussian")
BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class Adapters:
    """`targets`: names of layers, a pattern for whole paths, or None for every linear layer."""

    rank: int
    dropout: bool
    targets: tuple[str, ...] | str | None
    saved: tuple[str, ...] = ()

    def adapts(self, matrix: Matrix) -> bool:
        if not matrix.adapts or self.targets is None:
            return matrix.adapts
        if isinstance(self.targets, str):
            return _matches(self.targets, _paths(matrix.name))
        return any(
            matrix.name == target or matrix.name.endswith(f".{target}") for target in self.targets
        )

    @property
    def adapts_head(self) -> bool:
        """Whether the output layer is a target, which `all-linear` leaves out."""
        heads = ("lm_head", "embed_out")
        if isinstance(self.targets, str):
            return _matches(self.targets, heads)
        return bool(set(heads) & set(self.targets or ()))

    def block_parameters(self, shape: ModelShape) -> int:
        return sum(
            self.rank * (matrix.inputs + matrix.outputs)
            for matrix in shape.linears
            if self.adapts(matrix)
        )

    def root_parameters(self, shape: ModelShape) -> int:
        """Modules outside of blocks that are trained whole (`modules_to_save`): copies of them."""
        wanted = {"embed_tokens", "lm_head", "wte", "embed_in", "word_embeddings", "embed_out"}
        return len(wanted & set(self.saved)) * shape.embedding_parameters

    def parameters(self, shape: ModelShape) -> int:
        return shape.layers * self.block_parameters(shape) + self.root_parameters(shape)


def adapters_of(lora: Mapping[str, Any] | None, shape: ModelShape) -> Adapters | None:
    if lora is None:
        return None
    targets = lora.get("target_modules")
    found: tuple[str, ...] | str | None
    if targets is None:
        found = shape.family.adapts
    elif targets == "all-linear":
        found = None
    else:
        found = targets if isinstance(targets, str) else tuple(map(str, targets))
    return Adapters(
        rank=int(lora.get("r") or USUAL_RANK),
        dropout=bool(lora.get("lora_dropout")),
        targets=found,
        saved=tuple(map(str, lora.get("modules_to_save") or ())),
    )


def _matches(pattern: str, paths: Iterable[str]) -> bool:
    try:
        found = re.compile(pattern)
    except re.error:
        return False
    return any(found.fullmatch(path) for path in paths)


def _paths(name: str) -> list[str]:
    """Where a layer may stand in the model, for patterns that match whole paths."""
    part = name.rpartition(".")[2]
    rooms = ("self_attn.", "mlp.", "attention.", "self_attention.", "attn.", "")
    roots = ("model.layers.0.", "transformer.h.0.", "gpt_neox.layers.0.", "model.decoder.layers.0.")
    return [name, *(root + room + part for root in roots for room in rooms)]
