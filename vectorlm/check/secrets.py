"""Secrets where others can read them: in the YAML file, in files of the home. Floor 1, called by
`everything`. A secret that is found is never printed.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vectorlm import hub_cache
from vectorlm.check.finding import Finding, Surroundings, error, warning

# What a secret looks like, and what it is.
KINDS = (
    (re.compile(r"\bhf_[A-Za-z0-9]{20,}\b"), "a Hugging Face token"),
    (re.compile(r"\b(AKIA|ASIA)[0-9A-Z]{16}\b"), "an AWS access key"),
    (re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}\b"), "a GitHub token"),
    (re.compile(r"\bsk-[A-Za-z0-9_-]{20,}\b"), "an API key"),
    (re.compile(r"\bxox[abpr]-[A-Za-z0-9-]{10,}"), "a Slack token"),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"), "a private key"),
    (re.compile(r"\w+://[^/\s:@]+:[^/\s:@$]+@"), "a password in an address"),
    (
        re.compile(r"(?i)(api_?key|token|secret|passw(or)?d)[\"']?\s*[:=]\s*[\"']?[0-9a-f]{40}\b"),
        "a secret key",
    ),
    (re.compile(r"(?i)aws_secret\w*[\"']?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{40}\b"), "an AWS secret"),
    (re.compile(r"(?i)\b\w*(password|passwd)[\"']?\s*[:=]\s*[\"']?[^\s\"'$<{]{4,}"), "a password"),
)
CURE = (
    "remove it, and revoke it if others have seen the file; log in instead (hf auth login, wandb "
    "login), or set it in the environment from a file of yours"
)


def look(here: Surroundings) -> Iterator[Finding]:
    yield from _in_the_file(here)
    yield from _open_to_others(Path(here.config_path))
    for path in _token_files(here):
        yield from _readable(path)


def _in_the_file(here: Surroundings) -> Iterator[Finding]:
    told = set()
    for key, value in _texts(here.config.model_dump(mode="json"), ""):
        found = _secret(f"{key.rpartition('.')[2]}: {value}")
        if found:
            told.add(found[1])
            yield error(key, _said(found[0]), CURE)
    try:
        lines = Path(here.config_path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for number, line in enumerate(lines, 1):  # comments, too, are shared
        found = _secret(line)
        if found and not any(one in found[1] or found[1] in one for one in told):
            yield error(f"{here.config_path}:{number}", _said(found[0]), CURE)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _texts(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry, key)
    elif isinstance(value, str):
        yield key, value


def _secret(text: str) -> tuple[str, str] | None:
    """What it is, and the words that look so."""
    for pattern, what in KINDS:
        found = pattern.search(text)
        if found:
            return what, re.split(r"[\s:=,\"']+", found[0])[-1] or found[0]
    return None


def _said(what: str) -> str:
    return f"holds {what}: a secret, and configurations are shared and logged"


def _open_to_others(path: Path) -> Iterator[Finding]:
    if _mode(path) & stat.S_IWOTH and _reachable(path):
        text = "can be changed by everybody, also before a job reads it"
        yield warning(str(path), text, f"chmod o-w {path}")


def _token_files(here: Surroundings) -> list[Path]:
    environ = here.environ
    home = Path(environ.get("HOME") or os.path.expanduser("~"))
    token = environ.get("HF_TOKEN_PATH") or hub_cache.home(environ) / "token"
    return [Path(token), home / ".huggingface/token", Path(environ.get("NETRC") or home / ".netrc")]


def _readable(path: Path) -> Iterator[Finding]:
    if _mode(path) & (stat.S_IRGRP | stat.S_IROTH) and _reachable(path):
        who = "others" if _mode(path) & stat.S_IROTH else "your group"
        text = f"holds your keys, and can be read by {who}"
        yield warning(str(path), text, f"chmod 600 {path}")


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0


def _reachable(path: Path) -> bool:
    """Whether others can get at it at all: a folder that is closed to them protects what is in."""
    return all(_mode(folder) & (stat.S_IXOTH | stat.S_IXGRP) for folder in path.absolute().parents)
