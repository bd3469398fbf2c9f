"""LoRA adapters: read, checked against their base, merged module by module. Floor 3, for `export`.

PEFT does every merge itself, so each option of LoraConfig is right by construction. It is only
handed one layer at a time: the model stands on the meta device, a layer's weights are brought into
memory, merged, given on, and let go.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from vectorlm.blueprint import Base, Blueprint, build_empty, crop
from vectorlm.errors import ExportError
from vectorlm.model.lora import ADAPTER, adapter_names, base_name
from vectorlm.weights import WeightFiles, open_safetensors, read_json

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
# PEFT starts one of the two factors at zero, so that adapters begin as no change: B of layers, A of
# embeddings.
_ZERO_AT_START = ("lora_B", "lora_embedding_A")


@dataclass(frozen=True)
class Adapters:
    """Adapters as PEFT saves them."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]

    def peft_config(self) -> LoraConfig:
        try:
            config = PeftConfig.from_peft_type(**self.config)
        except (TypeError, ValueError, KeyError) as problem:
            raise ExportError(f"{CONFIG_FILE}: PEFT does not accept it: {problem}") from problem
        if not isinstance(config, LoraConfig):
            raise ExportError(
                f"{CONFIG_FILE}: peft_type {self.config.get('peft_type')!r}; only LORA is exported"
            )
        return config


def read_adapters(folder: Path) -> Adapters:
    """From a PEFT folder."""
    opened = open_safetensors(folder / WEIGHTS_FILE)
    return Adapters(
        read_json(folder / CONFIG_FILE), {n: opened.get_tensor(n) for n in opened.keys()}
    )


def check_adapters(adapters: Adapters, base: Base, origin: Path) -> Adapters:
    """The adapters without the vocabulary's padding; refused unless they fit the base and "
    "learned something."""
    if not adapters.tensors:
        raise ExportError(
            f"{origin}: the adapters are empty: nothing was learned or nothing was saved"
        )
    wanted = _wanted_shapes(adapters, base)
    if set(wanted) != set(adapters.tensors):
        odd = sorted(set(wanted) ^ set(adapters.tensors))
        raise ExportError(
            f"{origin}: the adapters do not fit {base.name} with their {CONFIG_FILE}: {len(odd)} "
            f"names differ, such as {odd[0]}. Set `model` to the model that was trained."
        )
    vocab_size = base.config.get_text_config().vocab_size
    fitted = {n: _fitted(n, t, wanted[n], vocab_size, origin) for n, t in adapters.tensors.items()}
    _require_learned(fitted, origin)
    return Adapters(adapters.config, fitted)


def _wanted_shapes(adapters: Adapters, base: Base) -> dict[str, torch.Size]:
    model = attach(build_empty(base.config, torch.float32), adapters, empty=True)
    parameters = dict(model.named_parameters())
    return {saved: parameters[name].shape for name, saved in adapter_names(model).items()}


def _fitted(
    name: str, tensor: torch.Tensor, shape: torch.Size, vocab_size: int, origin: Path
) -> torch.Tensor:
    cropped = crop(tensor, shape, vocab_size)
    if cropped is None:
        raise ExportError(
            f"{origin}: {name} has shape {list(tensor.shape)}, but the base asks for {list(shape)}"
        )
    if not bool(torch.isfinite(cropped).all()):
        raise ExportError(
            f"{origin}: {name} holds NaN or infinity, so training diverged; export an earlier "
            "checkpoint"
        )
    return cropped.contiguous()


def _require_learned(tensors: dict[str, torch.Tensor], origin: Path) -> None:
    started_at_zero = [
        t for name, t in tensors.items() if any(part in name for part in _ZERO_AT_START)
    ]
    if started_at_zero and not any(bool(t.any()) for t in started_at_zero):
        raise ExportError(
            f"{origin}: the adapters are as they were before the first step (all their B matrices "
            "are zero): nothing was learned, or the wrong weights were saved. Look at the loss "
            "in the log, and train again."
        )


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT warns of what it then does right by itself (Conv1D layers, tied embeddings); the "
    "proof is the judge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def attach(model: PreTrainedModel, adapters: Adapters, empty: bool = False) -> PeftModel:
    """The model with these adapters, or (`empty`) with room for them on the meta device."""
    config = copy.deepcopy(adapters.peft_config())
    config.inference_mode = False
    with quiet_peft():
        if empty:
            config.init_lora_weights = (
                True  # the others may compute with weights that are not there
            )
            return get_peft_model(model, config, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        peft_model = get_peft_model(model, config, adapter_name=ADAPTER)
        told: Any = set_peft_model_state_dict(peft_model, adapters.tensors, ADAPTER)
    if told.unexpected_keys:
        raise ExportError(f"PEFT does not know where adapters belong: {told.unexpected_keys[:3]}")
    return peft_model


class Merge:
    """Adapters merged into their base; iterate for (name, float32 tensor), as often as needed."""

    def __init__(self, base: Base, adapters: Adapters, blueprint: Blueprint) -> None:
        self.base, self.adapters, self.blueprint = base, adapters, blueprint
        self.files = WeightFiles(base.folder)
        self.names = _names_on_disk(blueprint, self.files)
        model = self._empty_model()
        saved = adapter_names(model)
        self.places = {name.removeprefix(_PREFIX): adapters.tensors[saved[name]] for name in saved}
        self.whole_reason = self._why_whole(model)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._merge_whole() if self.whole_reason else self._merge_by_module()

    def _empty_model(self) -> PeftModel:
        return attach(build_empty(self.base.config, torch.float32), self.adapters, empty=True)

    def _why_whole(self, model: PeftModel) -> str | None:
        """Why layers cannot be merged one by one, if so."""
        if self.names is None:
            return "transformers converts this model's weights when it loads them"
        for unit in _units(model.get_base_model()).values():
            if not isinstance(unit, Linear | Embedding | ModulesToSaveWrapper):
                return f"{type(unit).__name__} can only be merged by PEFT in the whole model"
        return None

    def _merge_whole(self) -> Iterator[tuple[str, torch.Tensor]]:
        model: Any = attach(load_base(self.base, torch.float32), self.adapters)
        with quiet_peft():
            merged = model.merge_and_unload(safe_merge=True)
        wanted = self.blueprint.expected
        yield from ((name, t) for name, t in merged.state_dict().items() if name in wanted)

    def _merge_by_module(self) -> Iterator[tuple[str, torch.Tensor]]:
        inner = self._empty_model().get_base_model()  # anew: PEFT notes in it what is merged
        units = _units(inner)
        for path, unit in units.items():
            yield from self._merge_unit(path, unit)
        inside = tuple(f"{path}." for path in units)
        for name in inner.state_dict():
            if not name.startswith(inside) and name not in self.blueprint.aliases:
                yield name, self._value(name)

    def _merge_unit(self, path: str, unit: Any) -> Iterator[tuple[str, torch.Tensor]]:
        prefix = f"{path}."
        for name in [name for name, _ in unit.named_parameters()]:
            set_tensor(unit, name, self._value(prefix + name))
        if isinstance(unit, ModulesToSaveWrapper):
            plain = unit.modules_to_save[ADAPTER]
        else:
            unit.merge(safe_merge=True)
            plain = unit.get_base_layer()
        merged = {name: parameter.detach() for name, parameter in plain.named_parameters()}
        unit.to(device="meta")
        yield from ((prefix + name, tensor) for name, tensor in merged.items())

    def _value(self, name: str) -> torch.Tensor:
        """Learned if it was, else the base's; merging in float32 rounds only once, at the end."""
        if name in self.places:
            return self.places[name].float()
        assert self.names is not None
        tensor = self.files.read(self.names[base_name(name)])
        return tensor.float() if tensor.is_floating_point() else tensor


def _units(inner: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that PEFT put around the model's own."""
    found: dict[str, nn.Module] = {}
    for path, module in inner.named_modules():
        is_peft = type(module).__module__.startswith("peft.")
        if is_peft and not path.startswith(tuple(f"{outer}." for outer in found)):
            found[path] = module
    return found


def _names_on_disk(blueprint: Blueprint, files: WeightFiles) -> dict[str, str] | None:
    """Name in memory -> name on disk; None where only transformers' own loading can tell."""
    have = set(files.names)
    prefix = f"{blueprint.model.base_model_prefix}."
    names = {}
    for name in blueprint.expected:
        disk_name = blueprint.disk_name(name)
        if disk_name is None:
            return None
        # Some repositories (gpt2) hold the inner model alone, without its prefix.
        spellings = (disk_name, disk_name.removeprefix(prefix), prefix + disk_name)
        found = next((spelling for spelling in spellings if spelling in have), None)
        if found is None:
            return None
        names[name] = found
    return names


def set_tensor(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))


def load_base(base: Base, dtype: torch.dtype) -> PreTrainedModel:
    """The base model, whole, as anyone would load it."""
    try:
        return AutoModelForCausalLM.from_pretrained(base.folder, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as problem:
        raise ExportError(
            f"{base.folder}: transformers cannot load the base model: {problem}"
        ) from problem
