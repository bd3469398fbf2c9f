"""`vectorlm prefetch`: bring what a job would download to this disk, while there is a network.
Floor 4.

Into HF_HOME (by default ~/.cache/huggingface), where jobs, which are offline, look.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vectorlm import hub_cache
from vectorlm.check.places import existing_parent, gib
from vectorlm.config.data_parts import parts_of
from vectorlm.config.load import load_config
from vectorlm.config.schema import Config, DatasetPreprocess
from vectorlm.errors import EXIT_OK, ModelError
from vectorlm.files import DISK_FULL
from vectorlm.source_files import find_files

# What a run reads; other formats of the same weights are left where they are.
WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
SAFETENSORS, PICKLES = "*.safetensors", "pytorch_model*.bin"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def prefetch(config_path: str, overrides: Sequence[str]) -> int:
    config = load_config(config_path, overrides)
    print(_model(config.model), flush=True)
    for line in _datasets(config):
        print(line, flush=True)
    return EXIT_OK


# --- the model ------------------------------------------------------------------------------------


def _model(name: str) -> str:
    if Path(os.path.expanduser(name)).is_dir():
        return f"model: {name} is a folder here: nothing to fetch"
    if not hub_cache.looks_like_hub_name(name):
        raise ModelError(
            f"model: {name} is neither a folder here nor a name of the hub such as "
            "meta-llama/Llama-2-7b-hf; mend the path"
        )
    _require_online()
    files = _wanted_files(name)
    _require_space(name, sum(size for _, size in files))
    folder = _download(name, [path for path, _ in files])
    total = sum(size for _, size in files)
    return f"model: {name}, {len(files)} files, {gib(total)}: {folder}"


def _require_online() -> None:
    for variable in OFFLINE:
        if os.environ.get(variable, "0").lower() in ("1", "true", "yes", "on"):
            raise ModelError(
                f"{variable} is set, so nothing can be fetched; where there is a network, run "
                f"{variable}=0 vectorlm prefetch ..."
            )


def _wanted_files(name: str) -> list[tuple[str, int]]:
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(name, files_metadata=True).siblings or []
    except Exception as error:  # its own errors, and those of the HTTP library it uses
        raise ModelError(_refusal(name, error)) from error
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings}
    has_safetensors = any(fnmatch(path, SAFETENSORS) and "/" not in path for path in sizes)
    patterns = (*WANTED, SAFETENSORS if has_safetensors else PICKLES)
    wanted = [(path, size) for path, size in sizes.items() if _matches(path, patterns)]
    if not any(path == "config.json" for path, _ in wanted):
        raise ModelError(f"model: {name} on the hub has no config.json; is it a language model?")
    return wanted


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return "/" not in path and any(fnmatch(path, pattern) for pattern in patterns)


def _require_space(name: str, needed: int) -> None:
    cache = hub_cache.hub()
    free = shutil.disk_usage(existing_parent(cache)).free
    if free < needed:
        raise ModelError(
            f"model: {name} takes {gib(needed)}, and {gib(free)} are free for {cache}; make room, "
            "or set HF_HOME to a folder on a larger file system that the nodes see, too"
        )


def _download(name: str, paths: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(paths)))
    except Exception as error:  # its own errors, and those of the HTTP library it uses
        raise ModelError(_refusal(name, error)) from error


def _refusal(name: str, error: Exception) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"model: {name} is gated: ask for access on https://huggingface.co/{name}, then log in "
            "with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"model: the hub has no {name}, or it is private; mend the name, or log in with `hf "
            "auth login`"
        )
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return (
            f"model: {name} could not be fetched: {os.strerror(error.errno or errno.ENOSPC)} in "
            f"{hub_cache.hub()}; make room, or set HF_HOME to a larger file system"
        )
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    return (
        f"model: {name} could not be fetched ({reason}); is there a network here? Run it again: "
        "what has been fetched is kept"
    )


# --- datasets -------------------------------------------------------------------------------------


def _datasets(config: Config) -> list[str]:
    prepare = config.dataset_preprocess
    if prepare is None:
        return []
    wanted = {(part.load_path, part.split): None for part, _ in parts_of(prepare)}
    if prepare.eval_save_path and prepare.val_split is None:
        wanted[(prepare.eval_load_path or prepare.load_path, prepare.eval_split)] = None
    return [_dataset(prepare, path, split) for path, split in wanted]


def _dataset(prepare: DatasetPreprocess, path: str, split: str | None) -> str:
    if find_files(prepare, path, split) is not None:
        return f"data: {path} is here: nothing to fetch"
    _require_online()
    from vectorlm.data.sources import find_source

    source: Any = find_source(prepare, path, split)
    return f"data: {path}{f', {split}' if split else ''}: {source.root}"
