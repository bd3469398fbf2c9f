"""Where the Hugging Face libraries keep what they have downloaded. Floor 1; `huggingface_hub` is
not needed to look.

    hub/models--ORG--NAME/refs/main           the newest commit that was fetched
    hub/models--ORG--NAME/snapshots/COMMIT/   its files
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def looks_like_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None


def home(environ: Mapping[str, str] = os.environ) -> Path:
    """HF_HOME, or what stands for it."""
    cache = environ.get("XDG_CACHE_HOME") or "~/.cache"
    given = environ.get("HF_HOME") or os.path.join(cache, "huggingface")
    return _path(given, environ)


def _path(text: str, environ: Mapping[str, str]) -> Path:
    if text == "~" or text.startswith("~/"):
        text = environ.get("HOME", os.path.expanduser("~")) + text[1:]
    return Path(text)


def hub(environ: Mapping[str, str] = os.environ) -> Path:
    given = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return _path(given, environ) if given else home(environ) / "hub"


def find_model(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    return _snapshot("models", name, environ)


def find_model_folder(given: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """A model given by path, or by name."""
    path = Path(given).expanduser()
    return path if path.is_dir() else find_model(given, environ)


def find_dataset(name: str, environ: Mapping[str, str] = os.environ) -> Path | None:
    """As the hub's client keeps it, or as `datasets` does."""
    found = _snapshot("datasets", name, environ)
    if found:
        return found
    given = environ.get("HF_DATASETS_CACHE")
    root = _path(given, environ) if given else home(environ) / "datasets"
    folder = root / name.replace("/", "___")
    return folder if folder.is_dir() else None


def _snapshot(kind: str, name: str, environ: Mapping[str, str]) -> Path | None:
    if not looks_like_hub_name(name):
        return None
    root = hub(environ) / f"{kind}--{name.replace('/', '--')}"
    try:
        commit = (root / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    folder = root / "snapshots" / commit
    return folder if commit and folder.is_dir() else None
