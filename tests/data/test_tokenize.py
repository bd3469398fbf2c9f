"""The tokenizer: ids as transformers gives them, and what a tokenizer's hash sees."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import TEXTS, changed, ids_of
from vectorlm.data import tokenize
from vectorlm.data.tokenize import TextTokenizer, load_tokenizer, tokenizer_sha256
from vectorlm.errors import ModelError


def split(flat: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, offsets = flat
    assert (ids.dtype, offsets.dtype) == (np.int32, np.int64)
    return [part.tolist() for part in np.split(ids, offsets[1:-1])]


def whole_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


ODD = ["", " ", "a</s>b", "<s>", "  two  spaces"]


def test_ids_are_those_of_transformers(tokenizer: TextTokenizer, tokenizer_folder: Path) -> None:
    whole = whole_tokenizer(tokenizer_folder)
    texts = TEXTS + ODD
    expected = [whole(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert split(tokenizer.encode_flat(texts)) == expected
    assert tokenizer.eos_id in expected[len(TEXTS) + 2]


def test_no_texts_have_no_ids(tokenizer: TextTokenizer) -> None:
    ids, offsets = tokenizer.encode_flat([])
    assert (ids.tolist(), offsets.tolist()) == ([], [0])


def test_a_slow_tokenizer_gives_the_same_ids(
    tokenizer: TextTokenizer, tokenizer_folder: Path
) -> None:
    resolved = replace(tokenizer.resolved, serialized=None)
    slow = TextTokenizer(resolved, slow=whole_tokenizer(tokenizer_folder))
    assert split(slow.encode_flat(TEXTS)) == split(tokenizer.encode_flat(TEXTS))
    assert slow.engine == "transformers"
    with pytest.raises(ModelError, match=r"no tokenizer.json, so it cannot be told"):
        slow.encode_with_offsets(["a"])


def test_offsets_are_characters(tokenizer: TextTokenizer) -> None:
    for text, (ids, start, stop) in zip(TEXTS, tokenizer.encode_with_offsets(TEXTS), strict=True):
        assert ids.tolist() == ids_of(tokenizer, text)
        assert (start[0], stop[-1]) == (0, len(text))
        assert (start <= stop).all()
    (empty,) = tokenizer.encode_with_offsets([""])
    assert [array.tolist() for array in empty] == [[], [], []]


def test_the_special_tokens_are_named(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert (tokenizer.bos, tokenizer.eos) == ("<s>", "</s>")


def test_a_tokenizer_that_splits_special_tokens_does_so_here(
    tokenizer: TextTokenizer, tokenizer_folder: Path
) -> None:
    splitting = changed(tokenizer, splits_special=True)
    whole = whole_tokenizer(tokenizer_folder)
    expected = whole("a</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ids_of(splitting, "a</s>") == expected != ids_of(tokenizer, "a</s>")


# --- loading and hashing ------------------------------------------------------------


Change = Callable[[Path], None]


def edit(name: str, change: Callable[[Any], None]) -> Change:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def swap_two_words(content: Any) -> None:
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


CHANGES: dict[str, Change] = {
    "vocabulary": edit("tokenizer.json", swap_two_words),
    "merges": edit("tokenizer.json", lambda content: content["model"]["merges"].pop()),
    "normalizer": edit("tokenizer.json", lambda c: c.update(normalizer={"type": "NFC"})),
    "eos": edit("tokenizer_config.json", lambda content: content.update(eos_token="<s>")),
}


@pytest.fixture
def copy(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "copy"))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_hash_sees_every_change_of_contents(
    change: Change, copy: Path, tokenizer: TextTokenizer
) -> None:
    assert load_tokenizer(str(copy)).sha256 == tokenizer.sha256
    change(copy)
    assert load_tokenizer(str(copy)).sha256 != tokenizer.sha256


def test_the_hash_does_not_see_truncation(copy: Path, tokenizer: TextTokenizer) -> None:
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit("tokenizer.json", lambda content: content.update(truncation=cut))(copy)
    found = load_tokenizer(str(copy))
    assert found.sha256 == tokenizer.sha256
    assert split(found.encode_flat(TEXTS)) == split(tokenizer.encode_flat(TEXTS))


def test_the_hash_does_not_see_what_a_caller_set(
    tokenizer: TextTokenizer, tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    whole = AutoTokenizer.from_pretrained(tokenizer_folder)
    whole.backend_tokenizer.enable_truncation(4)
    assert tokenizer_sha256(whole) == tokenizer.sha256


class SlowTokenizer:
    """The part of a slow tokenizer that is hashed."""

    is_fast = False
    bos_token_id, eos_token_id = 1, 2
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    def __init__(self, model: bytes) -> None:
        self.model = model

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1}

    def save_vocabulary(self, folder: str) -> tuple[str]:
        path = Path(folder) / "sentencepiece.model"
        path.write_bytes(self.model)
        return (str(path),)


def test_the_hash_of_a_slow_tokenizer_is_of_its_files() -> None:
    assert tokenizer_sha256(SlowTokenizer(b"x")) == tokenizer_sha256(SlowTokenizer(b"x"))
    assert tokenizer_sha256(SlowTokenizer(b"x")) != tokenizer_sha256(SlowTokenizer(b"y"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("nobody/nothing", "no folder nobody/nothing here, and its tokenizer cannot be had"),
    ],
)
def test_a_missing_model_is_said(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_tokenizer(name)


def test_a_folder_without_a_tokenizer_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded[\s\S]*needs tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_a_broken_tokenizer_file_is_said(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(str(copy))


# --- kept for the next start --------------------------------------------------------


@pytest.fixture
def no_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: str) -> None:
        raise AssertionError(f"transformers was asked for {model}")

    monkeypatch.setattr(tokenize, "load_transformers_tokenizer", refuse)


def test_a_second_load_needs_no_transformers(copy: Path, request: pytest.FixtureRequest) -> None:
    first = load_tokenizer(str(copy))
    request.getfixturevalue("no_transformers")
    again = load_tokenizer(str(copy))
    assert again.resolved == first.resolved
    assert split(again.encode_flat(TEXTS)) == split(first.encode_flat(TEXTS))
    (copy / "model.safetensors").write_bytes(b"weights")
    assert load_tokenizer(str(copy)).resolved == first.resolved


@pytest.mark.usefixtures("no_transformers")
@pytest.mark.parametrize("name", ["config.json", "added_tokens.json", "merges.txt", "spiece.model"])
def test_a_changed_folder_is_resolved_anew(name: str, copy: Path) -> None:
    (copy / name).write_text("{}")
    with pytest.raises(AssertionError, match="transformers was asked"):
        load_tokenizer(str(copy))


def test_a_second_process_imports_no_transformers(tokenizer_folder: Path) -> None:
    load_tokenizer(str(tokenizer_folder))
    code = (
        "import sys\nfrom vectorlm.data.tokenize import load_tokenizer\n"
        f"print(load_tokenizer({str(tokenizer_folder)!r}).encode_flat(['a b'])[0].tolist())\n"
        "sys.exit('transformers' in sys.modules or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
