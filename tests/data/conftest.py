"""Corpora, configurations and a tokenizer for the tests of preprocessing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vectorlm.config.schema import Config, DatasetPreprocess
from vectorlm.data.tokenize import TextTokenizer, load_tokenizer
from vectorlm.row_batch import RowBatch

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    'Quotes " and commas, and\na second line.',
    "Grüße aus Köln; 你好 🙂",
    "A baker bakes bread, a potter shapes bowls, and a smith forges lanterns. " * 5,
    "x",
]

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return load_tokenizer(str(tokenizer_folder))


def changed(tokenizer: TextTokenizer, **facts: Any) -> TextTokenizer:
    return replace(tokenizer, resolved=replace(tokenizer.resolved, **facts))


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    return tokenizer.encode_flat([text])[0].tolist()


def options_of(load_path: Path | str, **options: Any) -> DatasetPreprocess:
    return DatasetPreprocess(load_path=str(load_path), save_path="unused", **options)


@pytest.fixture
def make_config(tokenizer_folder: Path, tmp_path: Path) -> MakeConfig:
    """`make_config(load_path, packing_type="full")`; it saves to tmp_path/prepared."""

    def make(load_path: Path | str, max_seq_len: int = 16, **options: Any) -> Config:
        options = {"save_path": str(tmp_path / "prepared"), "packing_type": "full"} | options
        return Config.model_validate(
            {
                "model": str(options.pop("model", tokenizer_folder)),
                "train_parameters": {"output_dir": "out", "max_seq_len": max_seq_len},
                "dataset_preprocess": {"load_path": str(load_path), **options},
            }
        )

    return make


def texts(batches: Iterable[RowBatch]) -> list[str]:
    """The texts of a stream in which no row may be bad."""
    found = list(batches)
    assert not [bad for batch in found for bad in batch.bad]
    return [text for batch in found for text in batch.values]
