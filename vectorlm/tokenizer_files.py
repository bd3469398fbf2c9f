"""What a model folder's tokenizer files say, read without transformers. Floor 1; `preprocess`
writes the digest into the manifest, `check` compares it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAST = "tokenizer.json"
# What the tokenizers that have no tokenizer.json are made of.
SLOW = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
)
SETTINGS = "tokenizer_config.json"


# The library takes a dozen times the file's size; of larger ones the text is read over instead.
LARGEST_LOADED_BYTES = 12 << 20
BY_CONTENT, BY_BYTES = "content:", "bytes:"
_ADDED = re.compile(rb'"added_tokens"\s*:\s*\[(.*?)\]\s*,\s*"normalizer"', re.S)
_VOCABULARY = re.compile(rb'"vocab"\s*:\s*([{\[])')
# One entry and what stands before it: `"token": 5`, or `["token", -1.5]`.
_NUMBERED = re.compile(rb'[\s,]*"(?:[^"\\]+|\\.)*"\s*:\s*(\d+)')
_SCORED = re.compile(rb'[\s,]*\[\s*"(?:[^"\\]+|\\.)*"\s*,\s*[-+.eE\d]+\s*\]')


@dataclass(frozen=True)
class TokenizerFile:
    """tokenizer.json and the special tokens that tokenizer_config.json names."""

    base_tokens: int
    largest_id: int
    special: dict[str, int | None]  # bos and eos: their ids
    sha256: str


def read_tokenizer_file(folder: Path) -> TokenizerFile | None:
    """None where there is no tokenizer.json; ValueError when it cannot be read."""
    path = folder / FAST
    if not path.is_file():
        return None
    names = special_tokens(folder)
    if path.stat().st_size > LARGEST_LOADED_BYTES:
        return _read_over(path, names)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # silences a warning after a fork
    from tokenizers import Tokenizer

    try:
        tokenizer: Any = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises nothing more special
        raise ValueError(str(error).strip().splitlines()[0]) from error
    tokenizer.no_truncation()  # how an earlier caller cut and padded is no content
    tokenizer.no_padding()
    base = tokenizer.get_vocab_size(with_added_tokens=False)
    return TokenizerFile(
        base_tokens=base,
        largest_id=max([base - 1, *tokenizer.get_added_tokens_decoder()]),
        special={n: tokenizer.token_to_id(token) if token else None for n, token in names.items()},
        sha256=BY_CONTENT + _digest(tokenizer.to_str().encode(), names),
    )


def _read_over(path: Path, names: dict[str, str | None]) -> TokenizerFile:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if not text[-64:].rstrip().endswith(b"}"):
            raise ValueError("is cut off")
        found, vocabulary = _ADDED.search(text), _VOCABULARY.search(text)
        if found is None or vocabulary is None:
            raise ValueError("holds no vocabulary")
        added = {entry["content"]: entry["id"] for entry in json.loads(b"[" + found[1] + b"]")}
        base = _count(text, vocabulary.end(), _NUMBERED if vocabulary[1] == b"{" else _SCORED)
        return TokenizerFile(
            base_tokens=base,
            largest_id=max([base - 1, *added.values()]),
            special={name: added.get(token) if token else None for name, token in names.items()},
            sha256=BY_BYTES + _digest(text, names),
        )


def _count(text: mmap.mmap, at: int, entry: re.Pattern[bytes]) -> int:
    """One more than the largest number, or where entries have none, their count."""
    largest = count = 0
    while found := entry.match(text, at):
        at, count = found.end(), count + 1
        if entry is _NUMBERED:
            largest = max(largest, int(found[1]))
    return largest + 1 if entry is _NUMBERED else count


def _digest(content: bytes | mmap.mmap, names: dict[str, str | None]) -> str:
    digest = hashlib.sha256(content)
    digest.update(json.dumps([names.get("bos_token"), names.get("eos_token")]).encode())
    return digest.hexdigest()


def tokenizer_file_sha256(folder: Path) -> str | None:
    """None where it cannot be had; then nothing is compared."""
    try:
        found = read_tokenizer_file(folder)
    except ValueError:
        return None
    return found.sha256 if found else None


def added_tokens(folder: Path) -> dict[str, bool]:
    """What tokenizer.json keeps whole, and whether it is special; empty where it cannot be told."""
    try:
        found = _ADDED.search((folder / FAST).read_bytes())
        entries = json.loads(b"[" + found[1] + b"]") if found else []
    except (OSError, ValueError):
        return {}
    return {entry["content"]: bool(entry.get("special")) for entry in entries}


def special_tokens(folder: Path) -> dict[str, str | None]:
    """bos_token and eos_token, as far as the folder's files name them; ValueError if broken."""
    found: dict[str, str | None] = {}
    for name in ("special_tokens_map.json", SETTINGS):
        for key, value in _settings(folder / name).items():
            if key in ("bos_token", "eos_token"):
                found[key] = value.get("content") if isinstance(value, dict) else value
    return found


def _settings(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name}: is no JSON object")
    return content
