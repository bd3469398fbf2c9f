"""Is the model there, whole, and one that can be trained? Floor 1, called by `everything`."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vectorlm.check import libraries
from vectorlm.check.finding import Finding, Surroundings, error, note, warning
from vectorlm.check.model_files import (
    INDEX,
    PICKLE_INDEX,
    PICKLE_WHOLE,
    Broken,
    ModelFiles,
    Tensor,
    head,
    pickle_problem,
    read_object,
)
from vectorlm.hub_cache import looks_like_hub_name
from vectorlm.tokenizer_files import FAST, SETTINGS, SLOW, special_tokens

COPY = "copy the model folder again, or download it again"
MOST_NAMED = 3
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_EMBEDDING = re.compile(
    r"(?:^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$"
)


def look(here: Surroundings) -> Iterator[Finding]:
    model = here.model
    if model is None:
        yield _absent(here)
        return
    fetched = not Path(os.path.expanduser(here.config.model)).is_dir()
    for finding in _folder(here, model):
        yield _of_the_cache(here, finding) if fetched else finding


def _of_the_cache(here: Surroundings, finding: Finding) -> Finding:
    """A folder of the cache is not to be mended by hand."""
    text = f"{here.config.model}, fetched into {finding.where}, {finding.text}"
    if finding.severity != "error" or not finding.where.startswith("/"):
        return finding
    cure = f"fetch it again: {here.command('prefetch')}"
    copied = "copy" in finding.cure or "git lfs" in finding.cure
    return error("model", text, cure if copied else finding.cure)


def _folder(here: Surroundings, model: ModelFiles) -> Iterator[Finding]:
    if not os.access(model.folder, os.R_OK | os.X_OK):
        yield error("model", f"{model.folder} cannot be read by you", "ask its owner for access")
        return
    usable = yield from _config(here, model)
    if usable:
        yield from _weights(model)
        yield from _fits_config(model)
    yield from _tokenizer(here, model)
    if usable:
        yield from _length(here, model)


def _absent(here: Surroundings) -> Finding:
    name = here.config.model
    path = Path(os.path.expanduser(name))
    if path.exists():
        return error("model", f"{name} is a file", "give the folder that holds config.json")
    near = _neighbour(path)
    if near:
        return error("model", f"there is no folder {name}", f"did you mean {near}?")
    where = "" if path.is_absolute() else f" (looked for in {Path.cwd()})"
    if looks_like_hub_name(name) and not path.parent.is_dir():
        return error(
            "model",
            f"{name} is neither a folder here{where} nor a model in the local Hugging Face cache, "
            "and jobs have no internet",
            f"mend the path, or fetch it: {here.command('prefetch')}",
        )
    return error(
        "model",
        f"there is no folder {name}{where}",
        "give the folder of a model in the Hugging Face format",
    )


def _neighbour(path: Path) -> str | None:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    near = get_close_matches(path.name, names, n=1, cutoff=0.8)
    return str(path.parent / near[0]) if near else None


# --- config.json ----------------------------------------------------------------------------------


def _config(here: Surroundings, model: ModelFiles) -> Generator[Finding, None, bool]:
    """Yields findings; returns whether there is a configuration to go on with."""
    path = str(model.folder / "config.json")
    try:
        config = model.config
    except Broken as problem:
        yield error(path, *_no_config(model.folder, str(problem)))
        return False
    if model.model_type is None:
        yield error(path, "has no model_type", COPY)
        return False
    yield from _architecture(path, model.model_type, config)
    if config.get("quantization_config"):
        yield _quantised(path, config["quantization_config"])
    return True


def _no_config(folder: Path, problem: str) -> tuple[str, str]:
    """What is wrong, and the cure: what else the folder may be."""
    if (folder / "adapter_config.json").exists():
        return (
            f"{problem}: the folder holds LoRA adapters",
            "merge the adapters into their base model, and give that folder",
        )
    if (folder / "model.bin").exists():
        text = f"{problem}: the folder is what training wrote, before it was converted"
        return text, f"vectorlm convert makes a model of it: {folder.parent / 'hf-model'}"
    if any(folder.glob("*.gguf")):
        return f"{problem}: the folder holds a GGUF file", "take the Hugging Face format of it"
    if (folder / "params.json").exists():
        text = f"{problem}: the folder is in the format of the model's authors"
        return text, "take the Hugging Face format of it"
    inner = sorted(path.parent for path in folder.glob("*/config.json"))
    return problem, f"the model may be in {inner[0]}" if inner else COPY


def _architecture(path: str, model_type: str, config: dict[str, Any]) -> Iterator[Finding]:
    known, causal = libraries.model_types(), libraries.causal_types()
    if known is None or causal is None:
        return
    installed = libraries.version("transformers")
    if model_type not in known:
        if config.get("auto_map"):
            yield error(
                path,
                f"model_type {model_type} needs Python code from the model's folder (auto_map), "
                "which is never run here",
                "take a version of the model that transformers knows, or update transformers",
            )
        else:
            near = get_close_matches(model_type, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            yield error(
                path,
                f"model_type {model_type} is unknown to transformers {installed}{meant}",
                "update transformers, or mend config.json",
            )
    elif model_type not in causal:
        yield error(
            path,
            f"transformers {installed} has no causal language model for model_type {model_type}",
            "give a language model (a decoder)",
        )


def _quantised(path: str, settings: Any) -> Finding:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return error(
        path,
        f"the weights are quantised ({method or 'quantization_config'}), and only plain weights "
        "can be trained here",
        "take the unquantised version of the model, of 16 or 32 bits",
    )


def _length(here: Surroundings, model: ModelFiles) -> Iterator[Finding]:
    wanted, most = here.config.train_parameters.max_seq_len, model.max_positions
    if most and wanted > most:
        yield error(
            "train_parameters.max_seq_len",
            f"{wanted} is more than the {most} positions that {here.config.model} has",
            f"set at most {most}, and prepare the data again",
        )


# --- weights --------------------------------------------------------------------------------------


def _weights(model: ModelFiles) -> Iterator[Finding]:
    try:
        files = model.weight_files
    except Broken as problem:
        yield error(str(model.folder / INDEX), str(problem), COPY)
        return
    if not files:
        yield from _other_weights(model.folder)
        return
    missing = [path.name for path in files if not path.exists()]
    if missing:
        yield error(
            str(model.folder),
            f"{len(missing)} of {len(files)} weight files are missing: {_some(missing)}",
            COPY,
        )
    broken = False
    for path in files:
        if path.exists():
            found = _broken(path)
            broken = broken or found is not None
            if found:
                yield found
    if not missing and not broken:
        yield from _index_agrees(model)


def _broken(path: Path) -> Finding | None:
    try:
        head(path)
    except Broken as problem:
        text = str(problem)
        cure = "run `git lfs pull` in it, or download it again" if "git-lfs" in text else COPY
        return error(str(path), text, cure)
    except OSError as problem:
        return error(str(path), f"cannot be read ({problem.strerror})", "make it readable for you")
    return None


def _index_agrees(model: ModelFiles) -> Iterator[Finding]:
    named, there = model.named_files, model.tensors or {}
    lacking = [name for name in named or {} if name not in there]
    if lacking:
        yield error(
            str(model.folder / INDEX),
            f"{len(lacking)} of {len(named or {})} tensors are in no file: {_some(lacking)}",
            "index and files are of two versions; " + COPY,
        )


def _other_weights(folder: Path) -> Iterator[Finding]:
    index, whole = folder / PICKLE_INDEX, folder / PICKLE_WHOLE
    if not index.exists() and not whole.exists():
        yield error(str(folder), "holds no weights", _no_weights_cure(folder))
        return
    names = {PICKLE_WHOLE}
    if index.exists():
        try:
            names = set(read_object(index).get("weight_map", {}).values())
        except (Broken, AttributeError) as problem:
            yield error(str(index), f"{problem}", COPY)
            return
    missing = [name for name in sorted(names) if not (folder / name).exists()]
    if missing:
        text = f"{len(missing)} of {len(names)} weight files are missing: {_some(missing)}"
        yield error(str(folder), text, COPY)
    for name in sorted(names - set(missing)):
        fault = pickle_problem(folder / name)
        if fault:
            yield error(str(folder / name), fault, COPY)
    yield note(
        str(folder),
        "the weights are no safetensors: one process a run reads all of them into its memory",
        "nothing needs to be done; a safetensors version starts faster and with less memory",
    )


def _no_weights_cure(folder: Path) -> str:
    if (folder / "adapter_model.safetensors").exists():
        return "these are LoRA adapters; merge them into their model, and give that folder"
    others = [p.name for kind in ("*.safetensors", "*.pth", "*.gguf") for p in folder.glob(kind)]
    if others:
        return f"{_some(sorted(others))}: not in the Hugging Face format; {COPY}"
    return COPY


def _fits_config(model: ModelFiles) -> Iterator[Finding]:
    """Weights of another model than config.json describes."""
    tensors = model.tensors
    if not tensors or model.sound_config.get("quantization_config"):
        return
    where = str(model.folder)
    cure = "the folder mixes two models, or its config.json was edited; " + COPY
    for name, tensor in tensors.items():
        if _EMBEDDING.search(name) and len(tensor.shape) == 2 and model.vocab_size:
            if tensor.shape[0] != model.vocab_size and "vision" not in name:
                text = f"{name} has {tensor.shape[0]} tokens, config.json says {model.vocab_size}"
                yield error(where, text, cure)
    yield from _sizes(where, tensors, model, cure)
    found = {int(m[1]) for name in tensors if (m := _LAYER.search(name)) and "vision" not in name}
    if found and model.layers and model.sound_config is model.text_config:
        stored = max(found) + 1
        if stored < model.layers:
            text = f"the weights have {stored} layers, config.json says {model.layers}"
            yield error(where, text, cure)
        elif stored > model.layers + (model.sound_config.get("num_nextn_predict_layers") or 0):
            text = f"the weights have {stored} layers, of which config.json uses {model.layers}"
            yield warning(where, text, cure)


# Families whose matrices all have the sizes that config.json gives; which of them has which, as
# outputs and as inputs.
_PLAIN = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2"}
    | {"phi", "opt", "gpt_neox", "stablelm"}
)
_SIZES = {
    "intermediate_size": (
        ("gate_proj", "up_proj", "dense_h_to_4h"),
        ("down_proj", "dense_4h_to_h"),
    ),
    "ffn_dim": (("fc1",), ("fc2",)),
    "hidden_size": ((), ("q_proj", "k_proj", "v_proj", "query_key_value")),
}


def _sizes(
    where: str, tensors: Mapping[str, Tensor], model: ModelFiles, cure: str
) -> Iterator[Finding]:
    """One finding for each size that is another in the weights."""
    if model.model_type not in _PLAIN:
        return
    for key, (outputs, inputs) in _SIZES.items():
        wanted = model.text_config.get(key)
        for name, tensor in tensors.items():
            part = name.split(".")[-2:-1]
            if (
                len(tensor.shape) != 2
                or not isinstance(wanted, int)
                or not name.endswith(".weight")
            ):
                continue
            found = {0: part[0] in outputs, 1: part[0] in inputs}
            wrong = [tensor.shape[side] for side, given in found.items() if given]
            if any(size != wanted for size in wrong):
                text = f"{name} has shape {list(tensor.shape)}, config.json says {key} {wanted}"
                yield error(where, text, cure)
                break


# --- tokenizer ------------------------------------------------------------------------------------


def _tokenizer(here: Surroundings, model: ModelFiles) -> Iterator[Finding]:
    folder = model.folder
    cure = "copy the tokenizer's files from the model's page"
    try:
        special_tokens(folder)
    except ValueError as problem:
        yield error(str(folder / SETTINGS), f"cannot be read ({problem})", cure)
        return
    try:
        found = model.tokenizer
    except Broken as problem:
        raw = (folder / FAST).read_bytes()[:40]
        pointer = raw.startswith(b"version https://git-lfs")
        text = "is a git-lfs pointer" if pointer else f"cannot be read ({problem})"
        yield error(str(folder / FAST), text, "run `git lfs pull` in it" if pointer else cure)
        return
    if found is None:
        yield from _slow_tokenizer(folder, cure)
        return
    size = model.vocab_size
    if size is not None and found.largest_id >= size:
        yield _too_many_tokens(here, found, size)


def _too_many_tokens(here: Surroundings, found: Any, size: int) -> Finding:
    cure = "take the tokenizer that belongs to the model, or resize the model's embeddings"
    beyond = [name for name, number in found.special.items() if number and number >= size]
    prepares = here.config.dataset_preprocess
    if beyond and (prepares is None or prepares.add_bos_eos_tokens):
        text = f"{beyond[0]} of its tokenizer is token {found.special[beyond[0]]}"
        return error("model", f"{text}, and the model has embeddings for {size} tokens", cure)
    if found.base_tokens > size:
        text = f"its tokenizer has {found.base_tokens} tokens, and the model embeddings for {size}"
        return error("model", text, cure)
    text = (
        f"its tokenizer has tokens up to {found.largest_id}, and the model embeddings for {size}: "
        "data that holds the last ones is refused"
    )
    return warning("model", text, cure)


def _slow_tokenizer(folder: Path, cure: str) -> Iterator[Finding]:
    there = [name for name in SLOW if (folder / name).exists()]
    if not there:
        text = f"holds no tokenizer (no {FAST}, tokenizer.model or vocab.json)"
        yield error(str(folder), text, cure)
        return
    needs = [name for name in there if name.endswith((".model", ".tiktoken"))]
    readers = ("sentencepiece", "tiktoken")
    if needs == there and not any(libraries.package_folder(name) for name in readers):
        yield error(
            str(folder / needs[0]),
            f"there is no {FAST}, and to read {needs[0]} takes sentencepiece or tiktoken",
            "pip install sentencepiece protobuf, or copy tokenizer.json from the model's page",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", ..." if len(names) > MOST_NAMED else "")
