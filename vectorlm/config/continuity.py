"""What may change between a run's checkpoint and its continuation. Floor 0; asked by `resume` when
a run starts, and by `check` before.
"""

from __future__ import annotations

from typing import Any

from vectorlm.config.load import config_to_dict
from vectorlm.config.schema import Config

# A run that goes on with another one of these is not the run that was begun.
FIXED = (
    "model",
    "train_parameters.seed",
    "train_parameters.max_seq_len",
    "train_parameters.precision",
    "train_parameters.lora_peft_config",
    "train_parameters.optimizer.name",
    "dataset.longest_first",
    "dataset.group_by_length",
)
# What a run was that was begun before there were these keys.
BEFORE = {"dataset.longest_first": False, "dataset.group_by_length": False}
STEERING = (
    "train_parameters.optimizer",
    "train_parameters.lr_scheduler",
    "train_parameters.epochs",
)


def changes(config: Config, state: dict[str, Any]) -> dict[str, str]:
    """Key -> what it was in the checkpoint's `state` and is now, for every key that differs."""
    old, new = _flat(state["config"]), _flat(config_to_dict(config))
    old = {key: value for key, value in BEFORE.items() if key in new} | old
    old["train_parameters.precision"] = state["precision"]
    new["train_parameters.precision"] = config.train_parameters.effective_precision
    return {
        key: f"{key} (was {old.get(key)}, is {new.get(key)})"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def among(changed: dict[str, str], keys: tuple[str, ...]) -> list[str]:
    return [text for key, text in changed.items() if key.startswith(keys)]


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; what is not a mapping as JSON reads it."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict) and item:
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[prefix + key] = item
    return flat
