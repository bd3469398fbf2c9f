"""Words for a wrong key or value: what was given, is allowed, may have been meant. Floor 0."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from vectorlm.config.keys import MISSPELT, Key, KeyPath, all_keys, dotted, find, keys_of
from vectorlm.config.yaml_text import BOOLEANS, number

# A longer list of allowed keys would only hide the key that was probably meant.
MOST_NAMES = 12

# What other trainers call the same thing.
ELSEWHERE = {
    "learning_rate": ("train_parameters", "optimizer", "lr"),
    "beta": ("train_parameters", "optimizer", "betas"),
    "num_train_epochs": ("train_parameters", "epochs"),
    "num_epochs": ("train_parameters", "epochs"),
    "max_length": ("train_parameters", "max_seq_len"),
    "seq_len": ("train_parameters", "max_seq_len"),
    "max_seq_length": ("train_parameters", "max_seq_len"),
    "gradient_checkpointing": ("train_parameters", "use_activation_checkpointing"),
    "activation_checkpointing": ("train_parameters", "use_activation_checkpointing"),
    "mixed_precision": ("train_parameters", "precision"),
    "bf16": ("train_parameters", "precision"),
    "fp16": ("train_parameters", "precision"),
    "lora": ("train_parameters", "lora_peft_config"),
    "lora_config": ("train_parameters", "lora_peft_config"),
    "peft_config": ("train_parameters", "lora_peft_config"),
    "scheduler": ("train_parameters", "lr_scheduler_type"),
    "batch_size": ("dataset", "train_bs"),
    "per_device_train_batch_size": ("dataset", "train_bs"),
    "per_device_eval_batch_size": ("dataset", "eval_bs"),
    "model_name_or_path": ("model",),
    "model_name": ("model",),
    "packing": ("dataset_preprocess", "packing_type"),
}


@dataclass(frozen=True)
class Finding:
    """What to say about an unknown key, and the keys that may have been meant by it."""

    message: str
    candidates: list[KeyPath]


def unknown(path: KeyPath) -> Finding:
    """A key that the schema does not have at this place."""
    homes = [key.path for key in all_keys().values() if path[-1] in key.spellings]
    if homes:
        places = " or ".join(
            f"under {dotted(home[:-1])}" if home[:-1] else "at the top level" for home in homes
        )
        return Finding(f"misplaced; belongs {places}", homes)
    siblings = keys_of(path[:-1])
    names = list(dict.fromkeys(key.name for key in siblings.values()))
    meant = _meant(path, siblings)
    parts = ["unknown key"]
    if not meant or len(names) <= MOST_NAMES:
        parts.append("allowed: " + ", ".join(names))
    if meant:
        parts.append(f"did you mean {dotted(meant)}?")
    return Finding("; ".join(parts), [meant] if meant else [])


def section_for(path: KeyPath) -> KeyPath | None:
    """The section that an unknown key with a mapping below it was meant to be."""
    if find(path) is not None:
        return None
    candidates = unknown(path).candidates
    key = find(candidates[0]) if len(candidates) == 1 else None
    return key.path if key and key.kind in ("section", "mapping") else None


def wrong_value(path: KeyPath, loc: tuple[str | int, ...], value: Any, out_of_range: bool) -> str:
    """A value that its key cannot hold."""
    key = find(path)
    if key is None:
        return f"is {shown(value)}, which is not allowed here"
    item = loc[-1]
    which = f"item {item + 1} " if isinstance(item, int) and not isinstance(value, list) else ""
    given = f"{which}is {shown(value)}"
    given += ", which is out of range" if out_of_range else ""
    return "; ".join([given, f"must be {key.allowed}", *_value_hint(key, value)])


def shown(value: Any) -> str:
    """A value in the words of YAML."""
    if value is None:
        return "null (nothing)"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, str):
        return f"the text {_short(repr(value))}" if value else "an empty text"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "a mapping"
    digits = repr(value) if isinstance(value, float) else _digits(value)
    return f"the number {digits}"


def _digits(value: int) -> str:
    return str(value) if abs(value) < 10**40 else "of more than 40 digits"


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:50] + "..." + text[-5:]


def _meant(path: KeyPath, siblings: dict[str, Key]) -> KeyPath | None:
    name = path[-1].lower().replace("-", "_").replace(" ", "_")
    near = difflib.get_close_matches(name, list(siblings), n=1, cutoff=0.7)
    if near:
        return siblings[near[0]].path
    if name in ELSEWHERE:
        return ELSEWHERE[name]
    everywhere = {word: key.path for key in all_keys().values() for word in key.spellings}
    far = difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.75)
    near = difflib.get_close_matches(name, list(siblings), n=1, cutoff=0.6)
    if far:
        return everywhere[far[0]]
    return siblings[near[0]].path if near else None


def _value_hint(key: Key, value: Any) -> list[str]:
    if key.kind == "choice" and isinstance(value, str):
        spoken = [choice for choice in key.choices if choice not in MISSPELT]
        lower = {choice.lower().replace("-", "_"): choice for choice in spoken}
        near = difflib.get_close_matches(value.lower().replace("-", "_"), list(lower), n=1)
        if near:
            return [f"did you mean {lower[near[0]]}?"]
    if value in ("None", "none", "nil") and key.nullable:
        return ["did you mean null?"]
    if isinstance(value, str):
        return _quote_hint(key, value)
    if (
        key.kind == "integer"
        and isinstance(value, float)
        and value.is_integer()
        and abs(value) < 1e15
    ):
        return [f"write {int(value)}"]
    if key.kind == "text" and isinstance(value, int | float):
        return ["put it in quotes if a text is meant"]
    return []


def _quote_hint(key: Key, value: str) -> list[str]:
    numeric = key.kind in ("integer", "number", "pair") and number(value) is not None
    switch = key.kind == "boolean" and value.lower() in BOOLEANS
    return ["remove the quotes"] if numeric or switch else []
