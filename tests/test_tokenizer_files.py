"""tokenizer.json read by the library, and read over where it is too large for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.check.project import write_tokenizer
from vectorlm import tokenizer_files
from vectorlm.tokenizer_files import (
    read_tokenizer_file,
    special_tokens,
    tokenizer_file_sha256,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path, 300)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("largest", [12 << 20, 10])
def test_facts(folder: Path, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "LARGEST_LOADED_BYTES", largest)
    found = read_tokenizer_file(folder)
    assert found
    assert (found.base_tokens, found.largest_id) == (300, 299)
    assert found.special == {"bos_token": 0, "eos_token": 1}
    assert found.sha256 == tokenizer_file_sha256(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    last = {**content["added_tokens"][0], "id": 300, "content": 'odd " \\ token'}
    edit(folder, added_tokens=[*content["added_tokens"], last])
    grown = read_tokenizer_file(folder)
    assert grown
    assert (grown.base_tokens, grown.largest_id) == (300, 300)
    assert grown.sha256 != found.sha256


def test_how_it_cut_before_is_no_content(folder: Path) -> None:
    before = tokenizer_file_sha256(folder)
    cut = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    edit(folder, truncation=cut)
    assert tokenizer_file_sha256(folder) == before
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": {"content": "<s>"}}))
    assert special_tokens(folder)["eos_token"] == "<s>"
    assert tokenizer_file_sha256(folder) != before


@pytest.mark.parametrize("largest", [12 << 20, 10])
def test_a_file_that_was_cut(folder: Path, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "LARGEST_LOADED_BYTES", largest)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"cut off|EOF|line"):
        read_tokenizer_file(folder)
    assert tokenizer_file_sha256(folder) is None


def test_a_list_of_scores_is_counted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SentencePiece's unigram models have it."""
    monkeypatch.setattr(tokenizer_files, "LARGEST_LOADED_BYTES", 10)
    vocabulary = [["<unk>", 0.0], ["a]", -1.5], ['b"', -2e-3]]
    edit(folder, model={"type": "Unigram", "unk_id": 0, "vocab": vocabulary})
    found = read_tokenizer_file(folder)
    assert found
    assert found.base_tokens == 3


def test_none(tmp_path: Path) -> None:
    assert read_tokenizer_file(tmp_path) is None
    assert tokenizer_file_sha256(tmp_path) is None


def test_broken_settings_are_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        special_tokens(folder)
