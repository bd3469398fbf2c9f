"""What PEFT would refuse of `lora_peft_config`, or would put on no layer. Floor 1, called by
`everything`. The model's layers are known by the heads of its weight files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vectorlm.check import libraries
from vectorlm.check.arguments import meant
from vectorlm.check.finding import Finding, Surroundings, error, warning
from vectorlm.check.model_files import ModelFiles
from vectorlm.plan.lora import BIASES, STARTS

KEY = "train_parameters.lora_peft_config"
# Ways to begin that change the base weights.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")
# What names on disk may begin with and names in memory not, or the other way round.
_PREFIXES = (
    "",
    "model.",
    "transformer.",
    "gpt_neox.",
    "base_model.model.",
    "base_model.model.model.",
)


def look(here: Surroundings) -> Iterator[Finding]:
    given = here.config.train_parameters.lora_peft_config
    if given is None:
        return
    yield from _arguments(given)
    if here.model is not None:
        yield from _blocks(given, here.model)
        yield from _targets(given, here.model)
        yield from _saved(given, here.model)


# --- arguments ------------------------------------------------------------------------------------


def _arguments(given: Mapping[str, Any]) -> Iterator[Finding]:
    accepted = libraries.lora_arguments()
    for name in given if accepted is not None else ():
        if name not in (accepted or ()):
            hint = meant(name, accepted or ()) or ("did you mean r? " if name[:1] == "r" else "")
            cure = f"{hint}remove it, or take an argument that peft documents"
            yield error(f"{KEY}.{name}", f"{name} is no argument of peft.LoraConfig", cure)
    start = given.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        text = f"{start} changes the base model's weights, which adapters alone cannot carry"
        yield error(f"{KEY}.init_lora_weights", text, "allowed: true, gaussian, false")
    elif start not in STARTS:
        text = f"{start} is no way to begin that works here"
        yield error(f"{KEY}.init_lora_weights", text, "allowed: true, gaussian, false")
    bias = given.get("bias", "none")
    if bias not in BIASES:
        yield error(f"{KEY}.bias", f"{bias} is unknown", f"allowed: {', '.join(BIASES)}")
    if given.get("trainable_token_indices"):
        text = "tokens of their own cannot be trained with sharded weights"
        yield error(f"{KEY}.trainable_token_indices", text, "remove it")


def _blocks(given: Mapping[str, Any], model: ModelFiles) -> Iterator[Finding]:
    asked = given.get("layers_to_transform")
    if asked is None:
        return
    key = f"{KEY}.layers_to_transform"
    if isinstance(given.get("target_modules"), str):
        text = "goes only with a list of target_modules, not with a text"
        yield error(
            key, text, "give target_modules as a list, such as [q_proj, v_proj], or remove it"
        )
    numbers, layers = asked if isinstance(asked, list) else [asked], model.layers
    beyond = [n for n in numbers if isinstance(n, int) and layers is not None and n >= layers]
    if beyond and layers is not None:
        kind = error if len(beyond) == len(numbers) else warning
        text = f"there is no layer {beyond[0]}: the model has {layers} layers"
        yield kind(key, text, f"the first is 0, the last {layers - 1}")
    pattern = given.get("layers_pattern")
    patterns = pattern if isinstance(pattern, list) else [pattern] if pattern else []
    stored = model.tensors or {}
    if patterns and stored and not any(f"{one}." in name for one in patterns for name in stored):
        text = f"no layer's name has {', '.join(map(str, patterns))} in it"
        yield error(f"{KEY}.layers_pattern", text, "remove it")


# --- layers ---------------------------------------------------------------------------------------


def _targets(given: Mapping[str, Any], model: ModelFiles) -> Iterator[Finding]:
    targets, key = given.get("target_modules"), f"{KEY}.target_modules"
    if targets is None:
        types = libraries.lora_default_types()
        if types is not None and model.model_type and model.model_type not in types:
            text = f"is not given, and PEFT has no choice of its own for {model.model_type}"
            some = ", ".join(matrices(model)) or "its layers"
            yield error(key, text, f"give it: all-linear, or some of {some}")
        return
    layers = {name.rpartition(".")[0] for name in model.tensors or {}}
    if targets == "all-linear" or not layers:
        return
    if isinstance(targets, str):
        yield from _pattern(targets, layers, model)
    elif isinstance(targets, list):
        yield from _listed([str(name) for name in targets], layers, model)


def _pattern(pattern: str, layers: set[str], model: ModelFiles) -> Iterator[Finding]:
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as problem:
        text = f"{pattern} is no regular expression ({problem})"
        yield error(f"{KEY}.target_modules", text, "give a list of names, or mend it")
        return
    shortened = {layer.partition(".")[2] for layer in layers}
    if not any(matches(prefix + layer) for layer in layers | shortened for prefix in _PREFIXES):
        yield _no_match(pattern, model)


def _listed(names: Sequence[str], layers: set[str], model: ModelFiles) -> Iterator[Finding]:
    key, there = f"{KEY}.target_modules", f"the model has {', '.join(matrices(model))}"
    if not names:
        yield error(key, "is empty, so there would be nothing to train", f"{there}; or all-linear")
        return
    absent = [name for name in names if not any(_ends(layer, name) for layer in layers)]
    if len(absent) == len(names):
        yield _no_match(", ".join(names), model)
        return
    for name in absent:
        text = f"{name} matches no layer of the model, so nothing is trained there"
        yield warning(key, text, f"{meant(name, matrices(model))}{there}")
    for name in names:
        vectors = [
            stored
            for stored, tensor in (model.tensors or {}).items()
            if stored.endswith(f"{name}.weight") and len(tensor.shape) == 1
        ]
        if vectors:
            yield error(key, f"{name} is no matrix ({vectors[0]}), and takes no adapter", there)


def _no_match(targets: str, model: ModelFiles) -> Finding:
    # Experts are stacked in memory, under names that the files do not have.
    kind = warning if any("expert" in name for name in model.tensors or {}) else error
    return kind(
        f"{KEY}.target_modules",
        f"{targets} matches no layer of the model, so there would be nothing to train",
        f"the model has {', '.join(matrices(model))}",
    )


def _saved(given: Mapping[str, Any], model: ModelFiles) -> Iterator[Finding]:
    layers = {name.rpartition(".")[0] for name in model.tensors or {}}
    saved = given.get("modules_to_save")
    for name in saved if isinstance(saved, list) and layers else ():
        # A tied head has no weights of its own in the files.
        if name != "lm_head" and not any(_ends(layer, str(name)) for layer in layers):
            text = f"{name} is no part of the model"
            yield warning(f"{KEY}.modules_to_save", text, f"{meant(str(name), layers)}remove it")


def _ends(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def matrices(model: ModelFiles) -> list[str]:
    """The last names of the matrices inside blocks: q_proj, k_proj, ..."""
    return sorted(
        {
            name.split(".")[-2]
            for name, tensor in (model.tensors or {}).items()
            if name.endswith(".weight") and len(tensor.shape) == 2 and re.search(r"\.\d+\.", name)
        }
    )
