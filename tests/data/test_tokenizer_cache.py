"""The cache of tokenizers: private, whole or absent, never in the way."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from vectorlm.data import tokenizer_cache
from vectorlm.data.tokenizer_cache import Resolved, entry_path, read_entry, write_entry

RESOLVED = Resolved(
    serialized='{"model": "\u4f60\\n"}\nmore',
    bos_id=None,
    eos_id=7,
    bos=None,
    eos="</s>",
    sha256="a" * 64,
    file_sha256=None,
    splits_special=False,
    special={"eos_token": "</s>"},
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vectorlm" / "tokenizers"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def path_of(model: Path) -> Path:
    path = entry_path(model)
    assert path is not None
    return path


def test_what_is_kept_is_read_again_and_private(cache: Path, model: Path) -> None:
    path = path_of(model)
    assert read_entry(path) is None
    write_entry(path, RESOLVED)
    assert read_entry(path) == RESOLVED
    assert list(cache.iterdir()) == [path]
    assert [stat.S_IMODE(p.stat().st_mode) for p in (cache, path)] == [0o700, 0o600]


def test_the_home_is_taken_where_no_cache_is_named(
    cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of(model).parent == tmp_path / ".cache" / "vectorlm" / "tokenizers"


def test_the_name_is_of_contents_and_versions(
    cache: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = path_of(model)
    (model / "README.md").write_text("a")
    (model / "model.safetensors.index.json").write_text("b")
    copied = tmp_path / "copied"
    os.rename(model, copied)
    assert path_of(copied) == first
    (copied / "special_tokens_map.json").write_text("{}")
    second = path_of(copied)
    assert second != first
    monkeypatch.setattr(tokenizer_cache, "library_versions", lambda: ["transformers-99"])
    assert path_of(copied) != second


def test_versions_are_those_that_are_installed() -> None:
    import tokenizers
    import transformers

    assert tokenizer_cache.library_versions() == [
        f"transformers-{transformers.__version__}.dist-info",
        f"tokenizers-{tokenizers.__version__}.dist-info",
    ]


@pytest.mark.parametrize("content", [b"", b"{}\n", b"[]\nx", b"\xff", b'{"body_sha256": "x"}\nabc'])
def test_a_broken_entry_is_absent(content: bytes, cache: Path, model: Path) -> None:
    path = path_of(model)
    write_entry(path, RESOLVED)
    path.write_bytes(content)
    assert read_entry(path) is None


def test_a_changed_or_cut_entry_is_absent(cache: Path, model: Path) -> None:
    path = path_of(model)
    write_entry(path, RESOLVED)
    whole = path.read_bytes()
    for other in (whole[:-1], whole.replace(b"more", b"mora")):
        path.write_bytes(other)
        assert read_entry(path) is None


def test_what_others_could_have_written_is_not_trusted(cache: Path, model: Path) -> None:
    path = path_of(model)
    write_entry(path, RESOLVED)
    path.chmod(0o660)
    assert read_entry(path) is None
    path.chmod(0o600)
    os.rename(path, cache / "elsewhere")
    path.symlink_to(cache / "elsewhere")
    assert read_entry(path) is None


def test_what_cannot_be_written_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_entry(path_of(model), RESOLVED)
    assert read_entry(path_of(model)) is None


def test_a_slow_tokenizer_is_not_kept(cache: Path, model: Path) -> None:
    write_entry(path_of(model), replace(RESOLVED, serialized=None))
    assert not cache.exists()


def test_only_the_last_used_are_kept(cache: Path, model: Path) -> None:
    paths = [cache / f"{n}.tokenizer" for n in range(tokenizer_cache.KEPT + 2)]
    for age, path in enumerate(paths):
        write_entry(path, RESOLVED)
        os.utime(path, (age, age))
    read_entry(paths[2])
    write_entry(cache / "last.tokenizer", RESOLVED)
    left = {path.name for path in cache.iterdir()}
    assert len(left) == tokenizer_cache.KEPT
    assert {"last.tokenizer", "2.tokenizer"} <= left


def test_a_folder_that_cannot_be_read_has_no_entry(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entry_path(tmp_path / "absent") is None
    monkeypatch.setattr(tokenizer_cache, "LARGEST_BYTES", 1)
    assert entry_path(model) is None
