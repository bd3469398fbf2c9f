"""The model's tokenizer, and from texts to flat ids. Floor 2; called by `vectorlm.preprocess`, the
encoders, and by what compares a tokenizer with prepared data.

`load_tokenizer` gives what transformers makes of a model folder. transformers is imported only the
first time: what it made is kept by `data.tokenizer_cache`. Texts are encoded by `data.engine`, with
nothing added, cut or padded.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vectorlm.data import engine, tokenizer_cache
from vectorlm.data.engine import Engine, Flat
from vectorlm.data.tokenizer_cache import Resolved
from vectorlm.errors import ModelError
from vectorlm.hub_cache import find_model
from vectorlm.row import Tokens
from vectorlm.tokenizer_files import tokenizer_file_sha256

Characters = NDArray[np.int64]

LOOK_AGAIN = 64  # after so many batches, and whenever there were four times as many


@dataclass
class TextTokenizer:
    """What preprocessing needs of a tokenizer; `slow` is a transformers one, where there is no
    backend of `tokenizers`."""

    resolved: Resolved
    slow: Any = None
    chosen: Engine | None = field(default=None, init=False, repr=False)
    calls: int = field(default=0, init=False)
    next_look: int = field(default=LOOK_AGAIN, init=False)

    @property
    def bos_id(self) -> int | None:
        return self.resolved.bos_id

    @property
    def eos_id(self) -> int | None:
        return self.resolved.eos_id

    @property
    def bos(self) -> str | None:
        return self.resolved.bos

    @property
    def eos(self) -> str | None:
        return self.resolved.eos

    @property
    def sha256(self) -> str:
        return self.resolved.sha256

    @property
    def file_sha256(self) -> str | None:
        return self.resolved.file_sha256

    @property
    def engine(self) -> str:
        """What encodes; empty before the first texts have decided it."""
        return self.chosen.name if self.chosen else ""

    @property
    def reason(self) -> str:
        return self.chosen.reason if self.chosen else ""

    @cached_property
    def backend(self) -> Any:
        from tokenizers import Tokenizer

        assert self.resolved.serialized is not None
        backend: Any = Tokenizer.from_str(self.resolved.serialized)
        backend.encode_special_tokens = self.resolved.splits_special
        return backend

    def encode_flat(self, texts: list[str]) -> Flat:
        """Ids of all texts end to end, and where each starts; special tokens that stand in a text
        are recognised."""
        if self.chosen is None:
            self.chosen = self.choose(texts)
        self.calls += 1
        if self.calls == self.next_look:
            self.next_look *= 4
            self.look_again(texts)
        return self.chosen.encode(texts)

    def choose(self, texts: list[str]) -> Engine:
        serialized = self.resolved.serialized
        if serialized is None:
            slow = self.slow
            why = "the tokenizer has no backend of tokenizers"
            return Engine(engine.SLOW, why, lambda texts: engine.encode_slow(slow, texts))
        chosen = engine.choose(serialized, lambda: self.backend, texts)
        self.forget_backend(chosen)
        return chosen

    def look_again(self, texts: list[str]) -> None:
        """Whether the engine still gives the right ids, far from where it was chosen."""
        chosen = self.chosen
        if chosen is None or chosen.fast is None:
            return
        doubt = engine.disagreement(chosen.fast, self.backend, engine.make_sample(texts, []))
        if doubt:
            self.chosen = Engine(
                engine.PLAIN, doubt, lambda texts: engine.encode_plain(self.backend, texts)
            )
            raise engine.IdsDiffer(doubt)
        self.forget_backend(chosen)

    def forget_backend(self, chosen: Engine) -> None:
        """Dozens of megabytes that are hardly needed; made again if they are."""
        if chosen.fast is not None:
            self.__dict__.pop("backend", None)

    def encode_with_offsets(self, texts: list[str]) -> list[tuple[Tokens, Characters, Characters]]:
        """(ids, first character, character behind the last) of each text; slow."""
        if self.resolved.serialized is None:
            raise ModelError(NO_OFFSETS)
        return [
            (np.array(found.ids, np.int32), *spans(found.offsets))
            for found in self.backend.encode_batch(texts, add_special_tokens=False)
        ]


NO_OFFSETS = (
    "model: its tokenizer has no tokenizer.json, so it cannot be told which characters a token "
    "stands for.\nGive the model folder a tokenizer.json: load the tokenizer with "
    "transformers.AutoTokenizer and save it with save_pretrained."
)


def spans(offsets: list[tuple[int, int]]) -> tuple[Characters, Characters]:
    both = np.array(offsets, np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


# --- loading ------------------------------------------------------------------------


def load_tokenizer(model: str) -> TextTokenizer:
    """The tokenizer of a model folder or hub name; a ModelError if there is none."""
    # Set, it also keeps the library from warning when this process forks later.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    folder = Path(os.path.expanduser(model))
    entry = tokenizer_cache.entry_path(folder) if folder.is_dir() else None
    kept = tokenizer_cache.read_entry(entry) if entry else None
    if kept is not None:
        return TextTokenizer(kept)
    loaded = load_transformers_tokenizer(model)
    resolved = resolve(loaded, file_sha256(model, folder))
    if entry:
        tokenizer_cache.write_entry(entry, resolved)
    return TextTokenizer(resolved, slow=loaded if resolved.serialized is None else None)


def resolve(loaded: Any, file_sha256: str | None) -> Resolved:
    sha256 = tokenizer_sha256(loaded)
    backend = getattr(loaded, "backend_tokenizer", None) if loaded.is_fast else None
    if backend is not None:
        # A file may carry the truncation of some earlier use; nothing is ever cut here unasked.
        backend.no_truncation()
        backend.no_padding()
    return Resolved(
        serialized=None if backend is None else backend.to_str(),
        bos_id=loaded.bos_token_id,
        eos_id=loaded.eos_token_id,
        bos=loaded.bos_token,
        eos=loaded.eos_token,
        sha256=sha256,
        file_sha256=file_sha256,
        splits_special=bool(getattr(loaded, "split_special_tokens", False)),
        special={name: str(token) for name, token in loaded.special_tokens_map.items()},
    )


def file_sha256(model: str, folder: Path) -> str | None:
    found = folder if folder.is_dir() else find_model(model)
    return tokenizer_file_sha256(found) if found else None


def load_transformers_tokenizer(model: str) -> Any:
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir() and looks_like_path(model):
        raise ModelError(
            f"model: there is no folder {model}.\n"
            "Give the folder of a model in the Hugging Face format."
        )
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
