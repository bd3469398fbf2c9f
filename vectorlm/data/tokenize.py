"""Texts become token ids and labels. Floor 2; called by `vectorlm.preprocess`, and `load_tokenizer`
by others.

transformers is imported only where a tokenizer is loaded: importing it takes seconds. Encoding goes
to the tokenizer's fast (Rust) backend directly, many texts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vectorlm.data.pack import Document, Tokens
from vectorlm.data.readers import BadRow, TextRow
from vectorlm.errors import DataError, ModelError

BATCH_CHARACTERS = 1 << 19
NO_SEPARATOR = "separator absent"


@dataclass(frozen=True)
class TextTokenizer:
    """What preprocessing needs of a tokenizer; `backend` is a `tokenizers.Tokenizer`, or a slow
    transformers one."""

    backend: Any
    bos_id: int | None
    eos_id: int | None
    sha256: str
    fast: bool = True
    file_sha256: str | None = None  # of tokenizer.json, for `check`

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Ids without special tokens, never cut or padded."""
        if self.fast:
            return [
                np.array(e.ids, np.int32)
                for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)
            ]
        found = self.backend(
            texts, add_special_tokens=False, truncation=False, padding=False, verbose=False
        )
        return [np.array(ids, np.int32) for ids in found["input_ids"]]


# --- loading ------------------------------------------------------------------------


def load_tokenizer(model: str) -> TextTokenizer:
    """The tokenizer of a model folder or hub name; a ModelError if there is none."""
    loaded = load_transformers_tokenizer(model)
    backend = getattr(loaded, "backend_tokenizer", None) if loaded.is_fast else None
    if backend is not None:
        # A file may carry the truncation of some earlier use; nothing is ever cut here unasked.
        backend.no_truncation()
        backend.no_padding()
    return TextTokenizer(
        backend=loaded if backend is None else backend,
        bos_id=loaded.bos_token_id,
        eos_id=loaded.eos_token_id,
        sha256=tokenizer_sha256(loaded),
        fast=backend is not None,
    )


def load_transformers_tokenizer(model: str) -> Any:
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir() and looks_like_path(model):
        raise ModelError(
            f"model: there is no folder {model}.\n"
            "Give the folder of a model in the Hugging Face format."
        )
    # Set, it also keeps the library from warning when this process forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else model, local_files_only=folder.is_dir()
        )
    # A broken tokenizer.json comes out of the Rust library as a bare Exception, others as OSError,
    # ValueError, ...
    except Exception as error:
        raise ModelError(no_tokenizer(model, folder.is_dir(), error)) from error


def looks_like_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def no_tokenizer(model: str, is_folder: bool, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
    if not is_folder:
        return (
            f"model: there is no folder {model} here, "
            f"and its tokenizer cannot be had from the hub ({reason}).\n"
            "Mend the path; or download the model where there is a network, "
            "and set model to its folder."
        )
    return (
        f"model: the tokenizer in {model} cannot be loaded ({reason}).\n"
        "The folder needs tokenizer.json and tokenizer_config.json "
        "(or the vocabulary files of a slow tokenizer): copy them from the model's page."
    )


# --- what a tokenizer is ------------------------------------------------------------


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of a transformers tokenizer's contents: equal for a copied folder, other after any
    change of its ids."""
    if tokenizer.is_fast and getattr(tokenizer, "backend_tokenizer", None) is not None:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # How the last caller cut and padded is state, not content.
        content = {
            key: value for key, value in content.items() if key not in ("truncation", "padding")
        }
    else:
        content = slow_content(tokenizer)
    content["bos_eos"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def slow_content(tokenizer: Any) -> dict[str, Any]:
    """The class, the vocabulary, and the vocabulary files as it would write them anew."""
    with tempfile.TemporaryDirectory() as folder:
        written = sorted(Path(name) for name in tokenizer.save_vocabulary(folder) or ())
        files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in written]
    added = {str(number): str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    return {
        "class": type(tokenizer).__name__,
        "vocab": tokenizer.get_vocab(),
        "added": added,
        "files": files,
    }


# --- documents ----------------------------------------------------------------------


class DocumentEncoder:
    """Texts to documents: what is put before, around and between, and which part is learned."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        add_bos_eos_tokens: bool,
        pre_pend: str | None,
        separator: str | None,
        ignore_index: int,
    ) -> None:
        if add_bos_eos_tokens and tokenizer.eos_id is None:
            raise DataError(
                "dataset_preprocess.add_bos_eos_tokens is true, but the model's tokenizer has no "
                "EOS token.\n"
                "Set add_bos_eos_tokens: false, or define eos_token in the model's "
                "tokenizer_config.json."
            )
        self.tokenizer = tokenizer
        self.pre_pend = pre_pend or ""
        self.separator = separator
        self.ignore_index = ignore_index
        self.bos = special(tokenizer.bos_id if add_bos_eos_tokens else None)
        self.eos = special(tokenizer.eos_id if add_bos_eos_tokens else None)

    def encode(self, rows: Sequence[TextRow]) -> list[Document | BadRow]:
        """One result a row, in order; all parts of all rows go to the tokenizer at once."""
        parts = [self.split(self.pre_pend + row.text) for row in rows]
        encoded = iter(self.tokenizer.encode([text for pair in parts if pair for text in pair]))
        return [self.join(row, pair, encoded) for row, pair in zip(rows, parts, strict=True)]

    def split(self, text: str) -> tuple[str, ...] | None:
        """What is not learned and what is; the whole text alone without a separator, None where it
        is absent."""
        if self.separator is None:
            return (text,)
        end = text.find(self.separator)
        if end < 0:
            return None
        end += len(self.separator)
        return text[:end], text[end:]

    def join(
        self, row: TextRow, parts: tuple[str, ...] | None, encoded: Iterator[Tokens]
    ) -> Document | BadRow:
        if parts is None:
            return BadRow(
                row.where, NO_SEPARATOR, f"the separator {self.separator!r} is not in the text"
            )
        pieces = [next(encoded) for _ in parts]
        prompt = len(self.bos) + (len(pieces[0]) if len(pieces) == 2 else 0)
        ids = np.concatenate([self.bos, *pieces, self.eos])
        labels = ids.copy()
        labels[:prompt] = self.ignore_index
        return Document(ids, labels, row.where)


def special(token_id: int | None) -> Tokens:
    return np.array([] if token_id is None else [token_id], np.int32)


def batches(rows: Iterable[TextRow]) -> Iterator[list[TextRow]]:
    """Groups of rows of bounded size, whatever the length of a row."""
    group: list[TextRow] = []
    characters = 0
    for row in rows:
        group.append(row)
        characters += len(row.text)
        if characters >= BATCH_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group
