"""What the weights of a model must be: names, shapes and dtypes, from its config alone. Floor 2.

Built once on the meta device, without memory. `export` fits every tensor to it, `merge` walks it,
`proof` compares with it. Two sets of names are told apart: those in memory (`model.state_dict()`),
which trained weights have, and those on disk, which some families change on loading (experts are
stacked, for example).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vectorlm.errors import ExportError

Named = Iterable[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Base:
    """The model that was fine-tuned."""

    name: str
    folder: Path
    config: PretrainedConfig


def build_empty(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    # from_config writes the dtype into the config it is given.
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)


class Blueprint:
    """Names in memory -> what is expected there; tied weights once, `aliases` tells the other "
    "names."""

    def __init__(self, base: Base, dtype: torch.dtype) -> None:
        self.base, self.dtype = base, dtype
        self.model = build_empty(base.config, dtype)
        self.vocab_size = base.config.get_text_config().vocab_size
        self.expected: dict[str, torch.Tensor] = dict(self.model.named_parameters())
        self.aliases = self._find_aliases()
        for name, tensor in self.model.state_dict().items():
            if name not in self.aliases:
                self.expected.setdefault(name, tensor)
        self._float32 = _float32_parts(self.model, dtype)
        self._groups = self._group_names()

    def disk_name(self, name: str) -> str | None:
        """The name on disk; None where the tensor itself is another one there."""
        on_disk = revert_weight_conversion(self.model, {name: self.expected[name]})
        return next((n for n, t in on_disk.items() if t is self.expected[name]), None)

    @property
    def n_bytes(self) -> int:
        return sum(t.numel() * self.dtype_of(n, t).itemsize for n, t in self.expected.items())

    def dtype_of(self, name: str, tensor: torch.Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return torch.float32 if self._float32 and self._float32.search(name) else self.dtype

    def fit(self, tensors: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors, each once, cropped, cast and found finite; complains unless all are "
        "there."""
        seen: set[str] = set()
        tied: dict[str, torch.Tensor] = {}
        for given, tensor in tensors:
            name = self.aliases.get(given, given)
            if name in tied and torch.equal(tied[name], tensor):
                continue
            self._check_name(given, name, seen)
            seen.add(name)
            if name in self.aliases.values():
                tied[name] = tensor
            yield name, self._fit_one(name, tensor)
        if missing := [name for name in self.expected if name not in seen]:
            raise ExportError(
                f"{len(missing)} of {len(self.expected)} weights of {self.base.name} are missing, "
                f"such as {_some(missing)}. The file is incomplete or belongs to another model; "
                "export from a checkpoint with --from, or set `model` to the model that was "
                "trained."
            )

    def to_disk(self, tensors: Named) -> Iterator[tuple[str, torch.Tensor]]:
        """The same tensors under their names on disk, split or turned where the family asks for "
        "it."""
        if self._groups is None:
            yield from tensors
            return
        waiting: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors:
            key, size = self._groups[name]
            group = waiting.setdefault(key, {})
            group[name] = tensor
            if len(group) == size:
                for disk_name, part in revert_weight_conversion(
                    self.model, waiting.pop(key)
                ).items():
                    yield disk_name, part.contiguous()

    def _find_aliases(self) -> dict[str, str]:
        first = {id(parameter): name for name, parameter in self.expected.items()}
        every = self.model.named_parameters(remove_duplicate=False)
        return {n: first[id(p)] for n, p in every if n not in self.expected}

    def _check_name(self, given: str, name: str, seen: set[str]) -> None:
        if name not in self.expected:
            raise ExportError(
                f"{given}: {self.base.name} has no such weight. The weights belong to another "
                "model, or another version of transformers named them; set `model` to the model "
                "that was trained."
            )
        if name in seen:
            raise ExportError(
                f"{given}: given twice with different values, but {self.base.name} has one weight "
                f"there (tied: {[name, *(a for a, n in self.aliases.items() if n == name)]})"
            )

    def _fit_one(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted = self.expected[name]
        cropped = crop(tensor, wanted.shape, self.vocab_size)
        if cropped is None:
            raise ExportError(
                f"{name}: shape {list(tensor.shape)}, but {self.base.name} has "
                f"{list(wanted.shape)} there. The weights belong to another model; set `model` to "
                "the model that was trained."
            )
        result = cropped.to(self.dtype_of(name, wanted)).contiguous()
        _require_finite(name, cropped, result)
        return result

    def _group_names(self) -> dict[str, tuple[str, int]] | None:
        """Name -> (its group, the group's size); None where names on disk are those in memory.

        Conversions that need several weights at once find them in one decoder block; where that is
        not so, everything is one group.
        """
        # transformers only hands a state dict back untouched when the family has no conversions.
        if revert_weight_conversion(self.model, self.expected) is self.expected:
            return None
        by_block = {name: _block(name) for name in self.expected}
        if self._converted(by_block) != self._converted(dict.fromkeys(by_block, "")):
            by_block = dict.fromkeys(by_block, "")
        sizes = list(by_block.values())
        return {name: (key, sizes.count(key)) for name, key in by_block.items()}

    def _converted(self, group_of: dict[str, str]) -> dict[str, torch.Size]:
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for name, key in group_of.items():
            groups.setdefault(key, {})[name] = self.expected[name]
        parts = (revert_weight_conversion(self.model, group) for group in groups.values())
        return {name: tensor.shape for part in parts for name, tensor in part.items()}


def crop(tensor: torch.Tensor, shape: torch.Size, vocab_size: int) -> torch.Tensor | None:
    """`tensor` without the vocabulary's padding, or None if it has another shape than padding "
    "explains."""
    if tensor.dim() != len(shape):
        return None
    for dim, (have, want) in enumerate(zip(tensor.shape, shape, strict=True)):
        if have != want and not (want == vocab_size < have):
            return None
        tensor = tensor.narrow(dim, 0, want)
    return tensor


def _require_finite(name: str, source: torch.Tensor, result: torch.Tensor) -> None:
    if not result.is_floating_point() or _is_finite(result):
        return
    if _is_finite(source):
        raise ExportError(
            f"{name}: holds values too large for {result.dtype}; use --dtype bfloat16 or float32"
        )
    raise ExportError(
        f"{name}: holds NaN or infinity, so training diverged; export an earlier checkpoint with "
        "--from"
    )


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes carry NaN along, and unlike isfinite() need no second tensor of this size.
    return tensor.numel() == 0 or all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor))


def _float32_parts(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What transformers keeps in float32 whatever dtype is asked for (the bias of some expert "
    "routers)."""
    parts = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        parts |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return (
        re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(parts)))})(\.|$)") if parts else None
    )


def _block(name: str) -> str:
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
