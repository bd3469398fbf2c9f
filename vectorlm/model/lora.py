"""LoRA through PEFT. Floor 2, called by `load`."""

from __future__ import annotations

import re
import warnings
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from vectorlm.errors import ConfigError
from vectorlm.plan.lora import BIASES, STARTS

ADAPTER = "default"


def lora_config(arguments: dict[str, Any], base: str) -> LoraConfig:
    where = "train_parameters.lora_peft_config"
    try:
        config = LoraConfig(
            **{"task_type": "CAUSAL_LM", "base_model_name_or_path": base, **arguments}
        )
    except TypeError as error:
        raise ConfigError(f"{where}: {_unknown_arguments(arguments)}") from error
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{where}: {error}") from error
    if config.init_lora_weights not in STARTS:
        raise ConfigError(
            f"{where}.init_lora_weights: {config.init_lora_weights} changes the base model's "
            "weights, which adapters alone cannot carry, or is unknown; allowed: "
            "true, gaussian, false"
        )
    if config.bias not in BIASES:
        raise ConfigError(f"{where}.bias: {config.bias} is unknown; allowed: {', '.join(BIASES)}")
    if config.trainable_token_indices:
        raise ConfigError(
            f"{where}.trainable_token_indices: tokens of their own cannot be trained with sharded "
            "weights; remove it"
        )
    return config


def _unknown_arguments(arguments: dict[str, Any]) -> str:
    known = [field.name for field in fields(LoraConfig)]
    texts = []
    for key in sorted(arguments.keys() - set(known)):
        close = get_close_matches(key, known, n=1) or [k for k in known if k == key[:1]]
        texts.append(f"{key} is unknown" + (f", did you mean {close[0]}?" if close else ""))
    return f"{'; '.join(texts)}; allowed: the arguments of peft.LoraConfig"


def add_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    try:
        with warnings.catch_warnings():  # PEFT asks transformers for an attribute by its old name
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            return get_peft_model(model, config, adapter_name=ADAPTER)
    except ValueError as error:
        raise ConfigError(f"train_parameters.lora_peft_config: {error}") from error


def needs_base_weights(config: LoraConfig) -> bool:
    """Whether the adapters' first values are computed from the base weights."""
    return bool(config.use_dora)


def first_values(model: PeftModel, seed: int) -> dict[str, torch.Tensor]:
    """The adapters' first values, whole and on the host; the same on any number of ranks.

    `model` is on the meta device: PEFT's own initialisation is run on the adapters alone.
    """
    config = cast(LoraConfig, model.peft_config[ADAPTER])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                _materialise(module)
                module.reset_lora_parameters(ADAPTER, config.init_lora_weights)
    return {
        name: param.detach().clone()
        for name, param in model.named_parameters()
        if param.requires_grad and not param.is_meta
    }


def _materialise(layer: LoraLayer) -> None:
    """Give the adapters memory and torch's own first values, over which PEFT puts its own."""
    for part_name in layer.adapter_layer_names:
        parts = getattr(layer, part_name)
        if ADAPTER not in parts:
            continue
        part = parts[ADAPTER]
        if isinstance(part, nn.Module):
            part.to_empty(device="cpu")
            for module in part.modules():
                getattr(module, "reset_parameters", lambda: None)()
        else:
            parts[ADAPTER] = nn.Parameter(torch.randn(part.shape, dtype=part.dtype))


def base_name(name: str) -> str:
    """The base model's name of a parameter of the PEFT model."""
    name = name.removeprefix("base_model.model.")
    name = re.sub(rf"\.(modules_to_save\.{ADAPTER}|original_module)\.", ".", name)
    return name.replace(".base_layer.", ".")


def adapter_names(model: PeftModel) -> dict[str, str]:
    """Parameter name -> the name PEFT saves it under, for every trainable parameter."""
    marks = {
        name: torch.empty(0) for name, param in model.named_parameters() if param.requires_grad
    }
    saved = get_peft_model_state_dict(model, state_dict=dict(marks), save_embedding_layers=False)
    by_mark = {id(mark): name for name, mark in marks.items()}
    return {by_mark[id(mark)]: name for name, mark in saved.items() if id(mark) in by_mark}
