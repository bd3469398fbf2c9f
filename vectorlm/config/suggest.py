"""Words for a wrong key or value: what was given, is allowed, may have been meant. Floor 0."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from vectorlm.config.keys import MISSPELT, Key, KeyPath, all_keys, dotted, find, keys_of
from vectorlm.config.yaml_text import BOOLEANS, number

# A longer list of allowed keys would only hide the key that was probably meant.
MOST_NAMES = 12

# What other trainers, and Slurm itself, call the same thing.
ELSEWHERE = {
    "learning_rate": ("train_parameters", "optimizer", "lr"),
    "beta": ("train_parameters", "optimizer", "betas"),
    "num_train_epochs": ("train_parameters", "epochs"),
    "num_epochs": ("train_parameters", "epochs"),
    "max_steps": ("train_parameters", "epochs"),
    "num_steps": ("train_parameters", "epochs"),
    "total_steps": ("train_parameters", "epochs"),
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
    "cluster": ("slurm",),
    "job": ("slurm",),
    "sbatch": ("slurm",),
    "slurm_config": ("slurm",),
    "gpu": ("slurm", "gpus_per_node"),
    "gpus": ("slurm", "gpus_per_node"),
    "gres": ("slurm", "gpus_per_node"),
    "n_gpus": ("slurm", "gpus_per_node"),
    "num_gpus": ("slurm", "gpus_per_node"),
    "nproc_per_node": ("slurm", "processes_per_node"),
    "ntasks": ("slurm", "processes_per_node"),
    "ntasks_per_node": ("slurm", "processes_per_node"),
    "tasks_per_node": ("slurm", "processes_per_node"),
    "nnodes": ("slurm", "nodes"),
    "num_nodes": ("slurm", "nodes"),
    "cpus_per_task": ("slurm", "cpus_per_gpu"),
    "queue": ("slurm", "partition"),
    "memory": ("slurm", "mem"),
    "mem_per_node": ("slurm", "mem"),
    "timeout": ("slurm", "time"),
    "time_limit": ("slurm", "time"),
    "timelimit": ("slurm", "time"),
    "walltime": ("slurm", "time"),
    "features": ("slurm", "constraint"),
    "exclude_nodes": ("slurm", "exclude"),
    "email": ("slurm", "mail_user"),
    "mail": ("slurm", "mail_user"),
    "signal": ("slurm", "signal_lead_s"),
    "max_restarts": ("slurm", "max_requeues"),
    "max_retries": ("slurm", "max_requeues"),
    "interface": ("slurm", "network_interface"),
    "gloo_socket_ifname": ("slurm", "network_interface"),
    "nccl_socket_ifname": ("slurm", "network_interface"),
    "nccl_ib_disable": ("slurm", "disable_infiniband"),
    "modules": ("slurm", "setup"),
    "container": ("slurm", "container_image"),
    "image": ("slurm", "container_image"),
    "binds": ("slurm", "container_mounts"),
    "mounts": ("slurm", "container_mounts"),
    "flags": ("slurm", "extra_flags"),
    "nodelist": ("slurm", "extra_flags"),
    "sbatch_args": ("slurm", "extra_flags"),
    "parameters": ("sweep", "grid"),
    "search_space": ("sweep", "grid"),
    "max_parallel": ("sweep", "at_once"),
}
# Words that are a key elsewhere too, and what they mean here.
HERE = {
    ("preprocess",): ("dataset_preprocess",),
    ("slurm", "cpus"): ("slurm", "cpus_per_gpu"),
    ("slurm", "name"): ("slurm", "job_name"),
    ("slurm", "preprocess", "cpus_per_gpu"): ("slurm", "preprocess", "cpus"),
    ("slurm", "preprocess", "cpus_per_task"): ("slurm", "preprocess", "cpus"),
}


@dataclass(frozen=True)
class Finding:
    """What to say about an unknown key, and the keys that may have been meant by it."""

    message: str
    candidates: list[KeyPath]


def unknown(path: KeyPath) -> Finding:
    """A key that the schema does not have at this place."""
    homes = [key.path for key in all_keys().values() if path[-1] in key.spellings]
    if homes and path not in HERE:
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
        return _inside(path, value)
    item = loc[-1]
    which = f"item {item + 1} " if isinstance(item, int) and not isinstance(value, list) else ""
    given = f"{which}is {shown(value)}"
    given += ", which is out of range" if out_of_range else ""
    hints = _item_hint(key, value) if key.kind == "texts" and which else _value_hint(key, value)
    return "; ".join([given, f"must be {key.allowed}", *hints])


def _inside(path: KeyPath, value: Any) -> str:
    """A value in a mapping whose keys are not the schema's own."""
    while path[:-1] and find(path) is None:
        path = path[:-1]
    around = find(path)
    given = f"is {shown(value)}"
    return f"{given}; {dotted(path)} must be {around.allowed}" if around else given


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
    if path in HERE:
        return HERE[path]
    name = path[-1].lower().replace("-", "_").replace(" ", "_")
    if name in ELSEWHERE:
        elsewhere = ELSEWHERE[name]
        return siblings[elsewhere[-1]].path if elsewhere[-1] in siblings else elsewhere
    near = difflib.get_close_matches(name, list(siblings), n=1, cutoff=0.7)
    if near:
        return siblings[near[0]].path
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
        return _quote_hint(key, value) or (_mended(key, value) if key.kind == "text" else [])
    if (
        key.kind == "integer"
        and isinstance(value, float)
        and value.is_integer()
        and abs(value) < 1e15
    ):
        return [f"write {int(value)}"]
    if key.kind != "text":
        return []
    if isinstance(value, list):
        return _list_hint(key, value)
    if isinstance(value, int | float):
        plain = str(value) if isinstance(value, float) else _digits(value)
        if not key.pattern or key.takes(plain):
            return ["put it in quotes if a text is meant"]
    return []


def _item_hint(key: Key, value: Any) -> list[str]:
    """`- export A: b` is a mapping to YAML."""
    if isinstance(value, str):
        return _mended(key, value)
    return [] if value is None else ["put it in quotes if a text is meant"]


def _list_hint(key: Key, value: list[Any]) -> list[str]:
    """`partition: [a, b]` and `constraint: [a|b]` are lists to YAML."""
    joined = ",".join(map(str, value))
    if key.takes(f"[{joined}]"):
        return ["put it in quotes"]
    return [f"write {joined}"] if key.takes(joined) else []


def _quote_hint(key: Key, value: str) -> list[str]:
    numeric = key.kind in ("integer", "number", "pair") and number(value) is not None
    switch = key.kind == "boolean" and value.lower() in BOOLEANS
    return ["remove the quotes"] if numeric or switch else []


def _mended(key: Key, value: str) -> list[str]:
    """A text of a job script that is nearly right."""
    in_full = re.sub(r"~|\$\w+|\$\{\w+\}", "/x", value)
    if in_full != value and key.takes(in_full):
        return ["~ and $ mean nothing here: write the path in full"]
    nearly = (re.sub(" *, *", ",", value.strip()), value.upper(), re.sub("i?[bB]$", "", value))
    return [f"did you mean {text}?" for text in nearly if key.takes(text)][:1]
